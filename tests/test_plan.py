"""Plans: what a person may write, what composes, what a folder gives back, and what a session makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import steerkern as sk
from steerkern import Directions, Edit, Fingerprint, Plan, PlanError, Tokens, ablate, add, cap, clamp, probe, rotate
from steerkern.ops.reference import edit_rows
from steerkern.ops.schemas import Tables
from steerkern.program import Program, Site

WIDTH = 8
LAYERS = 4
SITES = [Site(layer, name) for layer in range(LAYERS) for name in ("resid_pre", "resid_mid")]
SITES.append(Site(LAYERS - 1, "resid_post"))
generator = torch.Generator().manual_seed(0)
V = [torch.randn(WIDTH, generator=generator) * (1 + i) for i in range(5)]
H = torch.randn(21, WIDTH, generator=generator)


def packed(plan: Plan) -> tuple[Program, int]:
    program = Program(SITES, plan.width)
    program.add(plan)
    return program, program.slot((plan.name, i) for i in range(len(plan.steps)))


def steered(plan: Plan) -> Tensor:
    """The rows as the plan leaves them, at every site: ``[sites, N, H]``."""
    program, slot = packed(plan)
    rows = torch.full((len(H),), slot, dtype=torch.int32)
    return torch.stack([edit_rows(H, rows, program.tables(i)) for i in range(len(SITES))])


def changes(plan: Plan) -> list[str]:
    return [str(site) for site, rows in zip(SITES, steered(plan), strict=True) if not torch.equal(rows, H)]


# layers and sites


@pytest.mark.parametrize(
    ("layers", "site", "where"),
    [
        ("all", "resid_pre", ["resid_pre[0]", "resid_pre[1]", "resid_pre[2]", "resid_pre[3]"]),
        ("all", "resid_mid", ["resid_mid[0]", "resid_mid[1]", "resid_mid[2]", "resid_mid[3]"]),
        ("all", "resid_post", ["resid_pre[1]", "resid_pre[2]", "resid_pre[3]", "resid_post[3]"]),
        (0, "resid_pre", ["resid_pre[0]"]),
        (0, "resid_post", ["resid_pre[1]"]),
        (3, "resid_post", ["resid_post[3]"]),
        ([2, 0, 2], "resid_mid", ["resid_mid[0]", "resid_mid[2]"]),
        (range(1, 3), "resid_pre", ["resid_pre[1]", "resid_pre[2]"]),
    ],
)
def test_a_plan_reaches_the_sites_that_it_names(layers: object, site: str, where: list[str]) -> None:
    assert changes(Plan(add(V[0]), layers=layers, site=site)) == where  # type: ignore[arg-type]


def test_resid_post_of_a_layer_is_resid_pre_of_the_next() -> None:
    for layer in range(LAYERS - 1):
        after = steered(Plan(ablate(V[0]), layers=layer, site="resid_post"))
        before = steered(Plan(ablate(V[0]), layers=layer + 1, site="resid_pre"))
        assert torch.equal(after, before)
        same = steered(Plan(ablate(V[0]), layers=layer, site="resid_pre"))
        assert not torch.equal(after, same)  # control


@pytest.mark.parametrize("layers", ["all", [1, 2, 3]])
def test_vectors_per_layer_keep_the_number_that_the_plan_uses(layers: object) -> None:
    """The vector of ``resid_post[2]`` stands at the site ``resid_pre[3]``, where the vector of layer 3 must not act."""
    own = {1: V[1], 2: V[2], 3: V[3]}
    out = steered(Plan(add(own), layers=layers, site="resid_post"))  # type: ignore[arg-type]
    at = {Site(2, "resid_pre"): V[1], Site(3, "resid_pre"): V[2], Site(3, "resid_post"): V[3]}
    for number, site in enumerate(SITES):
        torch.testing.assert_close(out[number], H + at[site] if site in at else H)
    out = steered(Plan(add(own), layers=layers))  # type: ignore[arg-type]
    for number, site in enumerate(SITES):
        torch.testing.assert_close(out[number], H + own[site.layer] if site.name == "resid_pre" and site.layer else H)


def test_resid_pre_and_resid_post_that_meet_keep_their_own_vectors() -> None:
    plan = Plan(add({1: V[1], 2: V[2]}), site="resid_post", name="post") + Plan(add({2: V[3], 3: V[4]}), name="pre")
    out = steered(plan)
    torch.testing.assert_close(out[SITES.index(Site(2, "resid_pre"))], H + V[1] + V[3])
    torch.testing.assert_close(out[SITES.index(Site(3, "resid_pre"))], H + V[2] + V[4])


def test_a_part_of_the_layers_of_directions_can_be_chosen() -> None:
    directions = Directions.of({1: V[1], 2: V[2], 3: V[3]})
    assert changes(Plan(add(directions))) == ["resid_pre[1]", "resid_pre[2]", "resid_pre[3]"]
    assert changes(Plan(add(directions), layers=2)) == ["resid_pre[2]"]
    assert changes(Plan(add(directions[2]), layers=3)) == ["resid_pre[3]"]


# composition


def test_plus_keeps_both_plans_on_the_row_as_it_arrived() -> None:
    one, two = Plan(ablate(V[0]), name="one", scale=0.5), Plan(clamp(V[1], 2.0), layers=1, name="two")
    both = one + two
    assert both.name == "one+two"
    expected = H + (steered(one) - H) + (steered(two) - H)
    for plan in (both, two + one):
        torch.testing.assert_close(steered(plan), expected, rtol=0, atol=1e-5)  # rows of size 5, rounded three times
    assert (one.name, len(one.steps), len(both.steps)) == ("one", 1, 2)
    assert (one + one).name == "one"
    assert [len((both + one).steps), len((one + both).steps)] == [3, 3]


def test_a_long_sum_still_has_a_name_that_can_be_saved(tmp_path: Path) -> None:
    plan = sum((Plan(add(V[0]), name=f"number {i}") for i in range(1, 30)), Plan(add(V[0]), name="number 0"))
    assert len(plan.name) == 128
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).name == plan.name


def test_named_and_scaled_leave_the_plan_alone() -> None:
    plan = Plan(ablate(V[0]), scale=2.0, name="a") + Plan(add(V[1]), name="b")
    assert plan.named("c").name == "c"
    assert [step.scale for step in plan.scaled(-0.5).steps] == [-1.0, -0.5]
    assert (plan.name, [step.scale for step in plan.steps]) == ("a+b", [2.0, 1.0])


def test_a_plan_says_what_it_does() -> None:
    plan = Plan(ablate(V[:2]), layers=[2, 1], site="resid_mid", scope=(-1, -5), keep_norm=True, name="a")
    plan += Plan([add(V[0]).when(V[1], lo=0), cap(V[0], hi=1)], scope="decode", scale=0.5, name="b")
    plan += Plan(probe(V[0]), scope=Tokens(start=3), name="c")
    assert repr(plan) == (
        "Plan('a+b+c': ablate (orthonormalised) at resid_mid[1, 2], prompt tokens [-1, -5], norm kept; "
        "add|gate+cap at resid_pre[all], decode, scale 0.5; probe at resid_pre[all], tokens 3:)"
    )


@pytest.mark.parametrize(
    ("scope", "tokens"),
    [
        ("all", Tokens()),
        ("prompt", Tokens("prompt")),
        ("decode", Tokens("decode")),
        (-1, Tokens("prompt", (-1,))),
        ((-1, 3), Tokens("prompt", (-1, 3))),
        ([0], Tokens("prompt", (0,))),
        (range(2), Tokens("prompt", (0, 1))),
        (Tokens("decode", None, 3, 9), Tokens("decode", None, 3, 9)),
        (Tokens("prompt", [1, 2]), Tokens("prompt", (1, 2))),  # type: ignore[arg-type]
    ],
)
def test_scopes(scope: object, tokens: Tokens) -> None:
    assert Plan(add(V[0]), scope=scope).steps[0].tokens == tokens  # type: ignore[arg-type]


# files

MODEL = Fingerprint("llama", WIDTH, LAYERS)
EDITS: dict[str, Edit] = {
    "add": add(V[0] * 1e-20, 1e20),
    "add per layer": add(dict(Directions.of({1: V[1], 2: V[2]}, model=MODEL)), -0.1),
    "ablate": ablate(V[0]),
    "ablate rank 3": ablate(V[:3], 0.3),
    "clamp": clamp(V[0], -1.25),
    "cap": cap(V[0], -1, 0.1),
    "cap above": cap(V[0], hi=1 / 3),
    "cap below": cap(V[0], lo=-1e-30),
    "rotate": rotate(V[0], V[1], 33.3),
    "probe": probe(torch.stack(V[:2])),
    "gated": ablate(V[0]).when(V[1], hi=0.1),
    "cosine": add(V[0]).when(V[1], -0.1, 1 / 3, cosine=True),
}


def tables(plan: Plan) -> list[Tables]:
    program, slot = packed(plan)
    return [program.tables(i) for i in range(len(SITES)) if program.tables(i).span[slot, 1] > 0]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"layers": [1], "site": "resid_post", "scope": (-1, 2), "keep_norm": True, "scale": 1 / 3},
        {"scope": Tokens("decode", None, 1, 7), "name": "A name+v1._-"},
    ],
)
def test_a_saved_plan_gives_back_every_bit(tmp_path: Path, name: str, how: dict[str, object]) -> None:
    plan = Plan(EDITS[name], **how)  # type: ignore[arg-type]
    plan.save_pretrained(tmp_path)
    found = Plan.from_pretrained(tmp_path)
    assert (repr(found), found.name, found.model) == (repr(plan), plan.name, plan.model)
    for a, b in zip(plan.steps, found.steps, strict=True):
        assert (a.layers, a.site, a.tokens, a.keep_norm, a.scale) == (b.layers, b.site, b.tokens, b.keep_norm, b.scale)
        for x, y in zip(a.edits, b.edits, strict=True):
            assert (x.kind, x.layers, x.rank, x.orthonormalised) == (y.kind, y.layers, y.rank, y.orthonormalised)
            for layer, rows in x.rows.items():
                assert torch.equal(rows.vectors, y.rows[layer].vectors)
                other = y.rows[layer]
                numbers = (other.norms, other.alpha, other.beta, other.lo, other.hi)
                assert (rows.norms, rows.alpha, rows.beta, rows.lo, rows.hi) == numbers
    same_tables(plan, found)


def same_tables(plan: Plan, found: Plan) -> None:
    for ours, theirs in zip(tables(plan), tables(found), strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its)


def test_a_composed_plan_with_shared_edits_can_be_saved(tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory, as the same edit in two steps does."""
    edit = ablate(V[:2]).when(V[3], lo=0)
    plan = Plan(edit, scope="prompt") + Plan(edit, scope="decode", scale=0.5) + Plan([edit, probe(V[4])])
    plan.save_pretrained(tmp_path)
    found = Plan.from_pretrained(tmp_path)
    assert repr(found) == repr(plan)
    same_tables(plan, found)
    assert torch.equal(steered(found), steered(plan))


def test_every_kind_at_once_survives_twice(tmp_path: Path) -> None:
    edits = [edit for edit in EDITS.values() if edit.layers is None]
    plan = Plan(edits, layers=[1, 2], name="all") + Plan(EDITS["add per layer"])
    plan.save_pretrained(tmp_path / "1")
    Plan.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    assert (tmp_path / "1" / "plan.json").read_bytes() == (tmp_path / "2" / "plan.json").read_bytes()
    same_tables(plan, Plan.from_pretrained(tmp_path / "2"))


# refusals

E = add(V[0])
OTHER = Directions.of({1: V[1]}, model=Fingerprint("qwen2", WIDTH, 4))
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no edit": (lambda: Plan([]), TypeError, r"edits must be one Edit or several, got \[\]"),
    "a tensor": (lambda: Plan(V[0]), TypeError, "edits must be one Edit"),
    "a number": (lambda: Plan(5), TypeError, "edits must be one Edit or several, got 5"),
    "a list of tensors": (lambda: Plan([V[0]]), TypeError, "edits must be one Edit"),
    "site": (lambda: Plan(E, site="resid"), ValueError, "site must be one of resid_pre, resid_mid, resid_post"),
    "site None": (lambda: Plan(E, site=None), ValueError, "got None"),
    "layers 'some'": (lambda: Plan(E, layers="some"), ValueError, "layers must be 'all', a number or .* got 'some'"),
    "layers None": (lambda: Plan(E, layers=None), TypeError, "layers must be 'all', a number or several, got None"),
    "layers 1.5": (lambda: Plan(E, layers=1.5), TypeError, "got 1.5"),
    "layers -1": (lambda: Plan(E, layers=-1), ValueError, "layer must be a whole number from 0, got -1"),
    "layers True": (lambda: Plan(E, layers=True), ValueError, "got True"),
    "layers []": (lambda: Plan(E, layers=[]), ValueError, "at least one layer, got none"),
    "layers ['1']": (lambda: Plan(E, layers=["1"]), ValueError, "got '1'"),
    "layers tensor": (lambda: Plan(E, layers=torch.tensor([1])), ValueError, "whole number from 0, got tensor"),
    "scope 'x'": (lambda: Plan(E, scope="x"), ValueError, "scope must be 'all', 'prompt', 'decode', 'reply', pos"),
    "scope None": (lambda: Plan(E, scope=None), TypeError, "scope must be .* got None"),
    "scope []": (lambda: Plan(E, scope=[]), ValueError, "positions must be whole numbers, at least one"),
    "scope [1.0]": (lambda: Plan(E, scope=[1.0]), ValueError, "positions must be whole numbers"),
    "scope True": (lambda: Plan(E, scope=True), ValueError, "positions must be whole numbers"),
    "positions in decode": (lambda: Tokens("decode", (1,)), ValueError, "phase 'decode' has none"),
    "positions 3": (lambda: Tokens("prompt", 3), ValueError, "positions must be whole numbers"),
    "start 0.5": (lambda: Tokens(start=0.5), ValueError, "start must be a whole number, got 0.5"),
    "stop 3 of 3": (lambda: Tokens(start=3, stop=3), ValueError, "stop must be above start 3, got 3"),
    "scale 0": (lambda: Plan(E, scale=0), ValueError, "scale must be finite and not 0 in float32, got 0.0"),
    "scale NaN": (lambda: Plan(E, scale=math.nan), ValueError, "scale must be finite"),
    "scale 'x'": (lambda: Plan(E, scale="2"), TypeError, "scale must be a number, got '2'"),
    "scaled 0": (lambda: Plan(E).scaled(0), ValueError, "scale must be finite and not 0"),
    "scaled away": (lambda: Plan(E, scale=1e-30).scaled(1e-30), ValueError, "scale must be finite and not 0"),
    "scaled up": (lambda: Plan(E, scale=1e30).scaled(1e30), ValueError, "scale must be finite and not 0"),
    "name": (lambda: Plan(E, name="a/b"), ValueError, "plan name must be 1 to 128 letters, .* got 'a/b'"),
    "name unicode": (lambda: Plan(E, name="é"), ValueError, "plan name must be"),
    "name empty": (lambda: Plan(E).named(""), ValueError, "plan name must be .* got ''"),
    "name long": (lambda: Plan(E, name="x" * 129), ValueError, "plan name must be"),
    "name None": (lambda: Plan(E, name=None), ValueError, "got None"),
    "widths": (lambda: Plan([E, add(torch.ones(5))]), PlanError, r"plan 'plan' mixes edits of widths \[5, 8\]"),
    "widths in a sum": (lambda: Plan(E) + Plan(add(torch.ones(5))), PlanError, r"mixes edits of widths \[5, 8\]"),
    "models": (lambda: Plan([EDITS["add per layer"], ablate(OTHER)]), PlanError, "several models: llama .*, qwen2 "),
    "missing layer": (lambda: Plan(EDITS["add per layer"], layers=[1, 3]), PlanError, r"layer 3: add has .* \[1, 2\]"),
    "65 entries": (lambda: Plan([add(torch.ones(33, 8)), add(torch.ones(32, 8))]), PlanError, "puts 65 entries on one"),
    "64 and a gate": (lambda: Plan(add(torch.ones(64, 8)).when(V[0], 0)), PlanError, "puts 65 entries on one row"),
    "plus an edit": (lambda: Plan(E) + E, TypeError, "unsupported operand"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    call, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# in a session


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(6)[None]).logits
        return found


@pytest.mark.parametrize("name", ["add", "add per layer", "ablate rank 3", "clamp", "cap below", "rotate", "gated"])
def test_the_scale_of_a_session_is_the_scale_of_the_plan(model: torch.nn.Module, name: str) -> None:
    plan = Plan(EDITS[name], name="p")
    with sk.steer(model, plan) as session:
        as_written = logits(model)
        session.set("p", scale=2.5)
        louder = logits(model)
        session.set("p", scale=1.0)
        assert torch.equal(logits(model), as_written)
        with pytest.raises(PlanError, match="no plan 'q' in this session; known are 'p'"):
            session.set("q", scale=1.0)
        with pytest.raises(PlanError, match="scale of plan 'p' must be finite in float32, got nan"):
            session.set("p", scale=math.nan)
        assert torch.equal(logits(model), as_written)
    with sk.steer(model, plan.scaled(2.5)):
        assert torch.equal(logits(model), louder)
    assert not torch.equal(louder, as_written)


def test_a_plan_of_another_model_is_refused_before_anything_changes(model: torch.nn.Module) -> None:
    before = logits(model)
    for fingerprint in (Fingerprint("qwen2", WIDTH, LAYERS), Fingerprint("llama", WIDTH, LAYERS + 1)):
        plan = Plan(ablate(Directions.of({1: V[1]}, model=fingerprint)), name="theirs")
        with pytest.raises(PlanError, match=r"plan 'theirs' was made for .*, the model is llama") as caught:
            sk.steer(model, plan)
        assert "\n" not in str(caught.value)
        assert torch.equal(logits(model), before)
    with sk.steer(model, Plan(EDITS["add per layer"])):  # control: the same model is welcome
        assert not torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan(E, layers=40, name="open"), r"layer 40: the model has 4 decoder layers \(0\.\.3\), plan 'open'"),
        (Plan(add({9: V[0]}), name="open"), r"layer 9: the model has 4 decoder layers \(0\.\.3\), plan 'open'"),
        (Plan(add(torch.ones(5)), name="open"), "plan 'open' has width 5, the model has 8"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_changes(
    model: torch.nn.Module, plan: Plan, text: str
) -> None:
    before = logits(model)
    with pytest.raises(PlanError, match=text):
        sk.steer(model, plan)
    with sk.steer(model, Plan(ablate(V[1]), name="held")) as session:
        held = logits(model)
        with pytest.raises(PlanError, match=text):
            session.add(plan)
        assert torch.equal(logits(model), held)
    assert torch.equal(logits(model), before)
    assert not torch.equal(held, before)


def test_edits_with_vectors_for_different_layers_need_named_layers() -> None:
    edits = [sk.ablate(torch.ones(4)), sk.add({1: torch.ones(4), 2: torch.ones(4)})]
    with pytest.raises(sk.PlanError, match="edits with vectors for different layers: name the layers$"):
        sk.Plan(edits)
    assert sk.Plan(edits, layers=[2]).steps[0].layers == (2,)


def test_directions_of_another_site_are_off_by_one_layer_and_refused() -> None:
    directions = sk.Directions.of({1: torch.ones(4)}, site="resid_post")
    with pytest.raises(sk.PlanError, match="add has the directions of resid_post, plan 'plan' writes resid_pre"):
        sk.Plan(sk.add(directions))
    sk.Plan(sk.add(directions), site="resid_post")
    sk.Plan(sk.add(dict(directions)))  # on purpose
