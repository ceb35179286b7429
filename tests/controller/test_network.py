"""The controller's network: its formula, its controls, and what it is read from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerkern import ArtifactError, Fingerprint, PlanError
from steerkern.artifacts import TENSORS, write_folder
from steerkern.controller import Controller
from steerkern.decisions import Read

READS = (Read(1, "resid_post"), Read(2, "resid_pre", -2))
LLAMA = Fingerprint("llama", 6, 4)


def made(**options):
    given = {"hidden": 5, "layer_norm": True, "weights": "softmax", "model": LLAMA, "provenance": {"a": [1]}, **options}
    return Controller(READS, [0, 2, 3], 6, **given)


def by_hand(controller, states):
    """The formula row by row in float64."""
    weights = {name: tensor.double() for name, tensor in controller.state_dict().items()}
    found = []
    for row in states.double():
        parts = []
        for h in row:
            if controller.layer_norm:
                h = (h - h.mean()) / torch.sqrt(h.var(correction=0) + 1e-5)
                h = h * weights["norm.weight"] + weights["norm.bias"]
            parts.append(h)
        x = torch.cat(parts)
        hidden = (weights["input.weight"] @ x + weights["input.bias"]).clamp_min(0)
        out = weights["output.weight"] @ hidden + weights["output.bias"]
        u = out[1:]
        w = 1 / (1 + torch.exp(-u)) if controller.weights == "sigmoid" else u.softmax(0) * len(u) / 2
        found.append((out[0], w))
    return torch.stack([s for s, _ in found]), torch.stack([w for _, w in found])


@pytest.mark.parametrize("width", [1, 7, 64, 129])
@pytest.mark.parametrize(("reads", "layers", "hidden"), [(1, 1, 1), (3, 4, 17)])
@pytest.mark.parametrize("weights", ["sigmoid", "softmax"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_scores_are_the_formula(width, reads, layers, hidden, weights, layer_norm):
    controller = Controller(
        [Read(i, "resid_post") for i in range(reads)],
        range(layers),
        width,
        hidden=hidden,
        weights=weights,
        layer_norm=layer_norm,
    )
    for rows in (1, 3, 65):
        states = torch.randn(rows, reads, width, generator=torch.Generator().manual_seed(rows))
        s, w = controller.scores(states)
        s64, w64 = by_hand(controller, states)
        # float32 sums of up to 387 terms
        torch.testing.assert_close(s.double(), s64, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(w.double(), w64, atol=2e-5, rtol=1e-5)
        assert torch.equal(controller.gains(states), (s[:, None] * w).detach())
    assert controller.gains(torch.empty(0, reads, width)).shape == (0, layers)


def test_half_precision_states_give_float32_gains():
    states = torch.randn(4, 2, 6)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = made().gains(states.to(dtype))
        assert found.dtype == torch.float32
        assert torch.equal(found, made().gains(states.to(dtype).float()))


def test_gains_have_no_gradient_unless_asked():
    states = torch.randn(4, 2, 6)
    assert not made().gains(states).requires_grad
    controller = made()
    controller.gains(states, grad=True).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in controller.parameters())


def test_a_row_does_not_depend_on_the_others():
    controller, states = made(), torch.randn(5, 2, 6)
    changed = states.clone()
    changed[1:] = torch.nan
    assert torch.equal(controller.gains(states)[0], controller.gains(changed)[0])


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = made(seed=1), made(seed=1), made(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.input.weight, other.input.weight)


@pytest.mark.parametrize("weights", ["sigmoid", "softmax"])
def test_controls_keep_the_strength_and_replace_the_weights(weights):
    controller, states = made(weights=weights), torch.randn(7, 2, 6)
    s, w = controller.scores(states)
    for control in (controller.uniform(), *(controller.shuffled(seed) for seed in range(4))):
        assert torch.equal(control.scores(states)[0], s)
    assert torch.equal(controller.uniform().scores(states)[1], torch.full((7, 3), 0.5))
    orders = set()
    for seed in range(8):
        moved = controller.shuffled(seed).scores(states)[1]
        order = tuple(int((moved[0, i] - w[0]).abs().argmin()) for i in range(3))
        assert all(place != i for i, place in enumerate(order))
        torch.testing.assert_close(moved, w[:, order], atol=1e-6, rtol=1e-6)
        orders.add(order)
    assert len(orders) == 2
    assert torch.equal(controller.scores(states)[1], w)
    with pytest.raises(ValueError, match="at least 2 layers"):
        Controller(READS, [0], 6, hidden=2).shuffled()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reads": []}, "number of reads must be"),
        ({"reads": [READS[0], READS[0]]}, "reads must be listed once"),
        ({"reads": [Read(-1)]}, "layer must be a whole number"),
        ({"reads": [Read(1, "resid_mad")]}, "site must be one of"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [-1]}, "layer must be a whole number"),
        ({"width": 0}, "width must be a whole number from 1"),
        ({"width": 1 << 18}, "width must be a whole number from 1"),
        ({"hidden": True}, "hidden must be a whole number"),
        ({"weights": "tanh"}, "weights must be sigmoid or softmax"),
        ({"every_token": True}, "reads token -1 only"),
        ({"provenance": {"x": math.nan}}, "provenance must be JSON"),
        ({"model": Fingerprint("llama", 7, 4)}, "reads width 6, the model is"),
        ({"model": Fingerprint("llama", 6, 3)}, r"layer 3 of the controller: the model has layers 0\.\.2"),
    ],
)
def test_bad_arguments(change, sentence):
    options = {"reads": READS, "layers": [0, 2, 3], "width": 6, "hidden": 2, **change}
    with pytest.raises(ValueError, match=sentence):
        Controller(options.pop("reads"), options.pop("layers"), options.pop("width"), **options)


def test_states_of_another_shape_are_refused():
    for shape in ((2, 6), (1, 3, 6), (1, 2, 7)):
        with pytest.raises(ValueError, match=r"states must be \[B, 2, 6\]"):
            made().gains(torch.zeros(shape))


# storing


@pytest.mark.parametrize("options", [{}, {"layer_norm": False, "weights": "sigmoid", "model": None}])
def test_a_saved_controller_is_the_same(tmp_path, options):
    controller = made(**options, seed=3)
    controller.save_pretrained(tmp_path)
    again = Controller.from_pretrained(tmp_path)
    assert (again.reads, again.layers, again.width, again.model) == (READS, (0, 2, 3), 6, options.get("model", LLAMA))
    assert again.provenance == {"a": [1]}
    states = torch.randn(9, 2, 6)
    assert torch.equal(again.gains(states), controller.gains(states))
    again.gains(states, grad=True).sum().backward()  # it can be trained on
    assert all(parameter.is_leaf for parameter in again.parameters())
    record, tensors = controller.to_record()
    json.dumps(record, allow_nan=False)
    assert all(1 <= tensor.dim() <= 2 and tensor.dtype == torch.float32 for tensor in tensors.values())
    with torch.no_grad():
        controller.input.weight.zero_()
    assert tensors["input.weight"].any()


def test_a_controller_of_another_model_is_refused(tmp_path):
    made().save_pretrained(tmp_path)
    Controller.from_pretrained(tmp_path, LLAMA)
    both = r"made for llama \(4 layers, width 6\), the model is gpt2 \(4 layers, width 6\)"
    with pytest.raises(PlanError, match=both):
        Controller.from_pretrained(tmp_path, Fingerprint("gpt2", 6, 4))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("reads", {}, "reads must be a list"),
        ("reads", [], "number of reads"),
        ("reads", [[1, "resid_post"]], r"a read must be \[layer, site, token\]"),
        ("reads", [[1, "resid_post", "median"]], "token must be"),
        ("reads", [[1, "resid_post", 1.5]], "token must be"),
        ("reads", [[True, "resid_post", -1]], "layer must be"),
        ("reads", [[9, "resid_post", -1], [2, "resid_pre", -2]], "layer 9 of the controller"),
        ("reads", [[1, "resid_post", -1]], r"input.weight must be float32 \[5, 6\]"),
        ("layers", [3, 2, 0], "layers must rise"),
        ("layers", [0, 2, 2], "layers must rise"),
        ("layers", [0, 2], r"output\.\w+ must be float32"),
        ("layers", ["0"], "layer must be"),
        ("width", 7, "reads width 7, the model is"),
        ("width", "6", "width must be a whole number"),
        ("hidden", 1 << 17, "must be float32"),
        ("hidden", 1 << 40, "hidden must be a whole number"),
        ("hidden", 5.0, "hidden must be a whole number"),
        ("layer_norm", 1, "layer_norm must be true or false"),
        ("layer_norm", False, "has the tensors"),
        ("weights", "tanh", "weights must be"),
        ("weights", None, "weights must be a string"),
        ("every_token", "no", "every_token must be"),
        ("every_token", True, "reads token -1 only"),
        ("model", ["llama", 6], "model must be"),
        ("model", ["llama", 8, 4], "the model is llama"),
        ("provenance", [], "provenance must be an object"),
        ("name", "../x", "name must be"),
        ("extra", 1, "unknown key 'extra'"),
    ],
)
def test_a_wrong_value_is_one_sentence(tmp_path, key, value, sentence):
    made().save_pretrained(tmp_path)
    header = json.loads((tmp_path / "controller.json").read_text())
    (tmp_path / "controller.json").write_text(json.dumps({**header, key: value}))
    with pytest.raises(ArtifactError, match=sentence) as caught:
        Controller.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("controller.json: ")


def test_a_missing_key_is_named(tmp_path):
    made().save_pretrained(tmp_path)
    header = json.loads((tmp_path / "controller.json").read_text())
    for key in ("name", "reads", "layers", "width", "hidden", "weights", "model", "provenance"):
        (tmp_path / "controller.json").write_text(json.dumps({k: v for k, v in header.items() if k != key}))
        with pytest.raises(ArtifactError, match=key):
            Controller.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("input.weight", torch.full((10, 6), torch.nan), "holds NaN or Inf"),
        ("input.weight", torch.zeros(9, 6), r"input.weight must be float32 \[10, 6\]"),
        ("output.bias", torch.zeros(4, dtype=torch.float16), "must be float32"),
        ("output.bias", torch.zeros(1, 4), r"output.bias must be float32 \[4\]"),
        ("norm.more", torch.zeros(6), "a controller has the tensors"),
    ],
)
def test_a_wrong_tensor_is_refused(tmp_path, name, tensor, sentence):
    record, tensors = made().to_record()
    with pytest.raises(ValueError, match=sentence):
        Controller.from_record(record, {**tensors, name: tensor})
    if tensor.dtype == torch.float32 and not tensor.isnan().any():
        write_folder(tmp_path, "controller", {"name": "c", **record}, {**tensors, name: tensor})
        with pytest.raises(ArtifactError, match=sentence):
            Controller.from_pretrained(tmp_path)


def test_claimed_sizes_allocate_nothing():
    record, tensors = made(model=None).to_record()
    # 2048 TB of weights, if they were believed
    huge = {**record, "hidden": 1 << 17, "width": 1 << 17, "reads": [[i, "resid_post", -1] for i in range(1024)]}
    with pytest.raises(ValueError, match="must be float32"):
        Controller.from_record(huge, tensors)


def test_wide_inputs_fit_the_format(tmp_path):
    wide = Controller([Read(i, "resid_post") for i in range(9)], [0], 1 << 14, hidden=1)
    wide.save_pretrained(tmp_path)  # 147,456 inputs, and a tensor row holds at most 131,072
    assert Controller.from_pretrained(tmp_path).input.weight.shape == (1, 9 << 14)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_never_give_another_error(tmp_path, data):
    folder = tmp_path / "c"
    made().save_pretrained(folder)
    name = data.draw(st.sampled_from(["controller.json", TENSORS]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = Controller.from_pretrained(folder)
    except ArtifactError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert found.gains(torch.zeros(1, len(found.reads), found.width)).isfinite().all()


def test_halves_of_two_controllers_are_not_read_as_one(tmp_path):
    made().save_pretrained(tmp_path / "a")
    made(seed=1).save_pretrained(tmp_path / "b")
    Path(tmp_path / "b" / TENSORS).replace(tmp_path / "a" / TENSORS)
    with pytest.raises(ArtifactError, match="belongs to another"):
        Controller.from_pretrained(tmp_path / "a")
