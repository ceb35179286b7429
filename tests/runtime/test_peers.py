"""Wrong results seen in other steering libraries, each as a test named after the symptom.

The numbers are those of the survey of peers. Most tests carry a control: the peer's mistake in a few lines of plain
torch, which the assertion of the test must catch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import steerkern as sk
from steerkern.runtime.sites import Anatomy, examine
from tests.runtime import families
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, hooked, tiny_llama

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LAYER = 2
STRENGTH = 3.0
ALL_FUSE = ["all", "sites", "none"]
TOLERANCE = 1e-3  # logits up to 10, fp32: the norms of the kernel sum in another order than torch's
CLEAR = 20 * TOLERANCE  # what tells two results apart

Change = Callable[[Tensor], Tensor]
Push = Callable[[int, int], Tensor | float]
"""Position and prompt length -> what is added to the row there."""


def unit(seed: int, width: int = WIDTH) -> Tensor:
    return nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


def prompt_of(length: int, seed: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def batch_of(side: str = "none") -> tuple[Tensor, Tensor]:
    """Three prompts ``[3, 9]`` with their mask: all of 9 tokens, or of 9, 6 and 4 padded on one side."""
    ids = torch.stack([prompt_of(9, seed) for seed in (5, 6, 7)])
    mask = torch.ones_like(ids)
    for row, missing in ((1, 3), (2, 5)) if side != "none" else ():
        mask[row, slice(0, missing) if side == "left" else slice(9 - missing, 9)] = 0
    return ids * mask, mask


def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits.clone()


def generated(model: LlamaForCausalLM, ids: Tensor, **options: object) -> Tensor:
    """Logits ``[B, NEW, V]`` of a greedy reply by ``generate``."""
    options = {"attention_mask": torch.ones_like(ids), **options}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY, **options)
    return torch.stack(out.logits, 1)


def by_hand(model: LlamaForCausalLM, prompt: Tensor, push: Push) -> Tensor:
    """The same ``[NEW, V]`` for one prompt, recomputed in full at every step, with ``push`` added before ``LAYER``."""
    ids, steps = prompt[None], []
    for _ in range(NEW):
        pushes = [torch.as_tensor(push(p, len(prompt)), dtype=torch.float32) for p in range(ids.shape[1])]
        rows = torch.stack([one.expand(WIDTH) for one in pushes])
        with hooked(model, LAYER, lambda h, rows=rows: h + rows):
            steps.append(logits(model, ids, use_cache=False)[0, -1])
        ids = torch.cat([ids, steps[-1].argmax().view(1, 1)], 1)
    return torch.stack(steps)


def far(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) > CLEAR


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@contextlib.contextmanager
def written(model: LlamaForCausalLM, layer: int = LAYER) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Per forward, the output of the block before ``layer`` as it was returned and as it is now, ``[B, S, H]``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(block: nn.Module, args: object, output: Tensor) -> None:
        seen.append((output.clone(), output))

    handle = model.model.layers[layer - 1].register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def rows_of(pair: tuple[Tensor, Tensor]) -> list[list[bool]]:
    return (pair[0] != pair[1]).any(-1).tolist()


def plan(vector: Tensor, scope: object = "all", **options: object) -> sk.Plan:
    return sk.Plan(sk.add(vector, STRENGTH), **{"layers": [LAYER], "scope": scope, "name": "p", **options})


# 1-5: positions


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("start", [15, 16, 18])
def test_min_token_index_is_not_relative_to_the_forward_chunk(
    model: LlamaForCausalLM, vector: Tensor, cache: dict[str, object], start: int
) -> None:
    prompt = prompt_of(16)
    expected = by_hand(model, prompt, lambda p, n: STRENGTH * vector if p >= start else 0.0)
    with sk.steer(model, plan(vector, sk.Tokens(start=start))) as session:
        same(generated(model, prompt[None], **cache)[0], expected)
        assert session.receipt()["p"].rows == {0: [(start, 16 + NEW - 2)]}

    def chunk(h: Tensor) -> Tensor:
        return h + STRENGTH * vector * (torch.arange(h.shape[1]) >= start)[:, None]

    with hooked(model, LAYER, chunk):
        assert far(generated(model, prompt[None])[0], expected)


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_an_edit_does_not_act_in_the_prefill_only(model: LlamaForCausalLM, vector: Tensor, fuse: str) -> None:
    ids = batch_of()[0]
    every_step = [[[True] * 9] * 3] + [[[True]] * 3] * (NEW - 1)
    with sk.steer(model, plan(vector), fuse=fuse), written(model) as seen:
        model.generate(ids, **GREEDY)
        assert [rows_of(pair) for pair in seen] == every_step
    with sk.steer(model, plan(vector, "decode"), fuse=fuse), written(model) as seen:
        model.generate(ids, **GREEDY)
        assert [rows_of(pair) for pair in seen] == [[[False] * 9] * 3, *every_step[1:]]

    def once(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(STRENGTH * vector)
        handle.remove()

    handle = model.model.layers[LAYER].register_forward_pre_hook(once)
    with written(model) as seen:
        model.generate(ids, **GREEDY)
        assert [rows_of(pair) for pair in seen] == [[[True] * 9] * 3] + [[[False]] * 3] * (NEW - 1)


def test_prompt_and_generated_tokens_are_separate_choices_and_both_fit_one_call(
    model: LlamaForCausalLM, vector: Tensor
) -> None:
    prompt, other = prompt_of(9), unit(8)
    in_prompt, in_reply = STRENGTH * vector, STRENGTH * other
    cases: dict[str, tuple[sk.Plan, Push]] = {
        "prompt": (plan(vector, "prompt"), lambda p, n: in_prompt if p < n else 0.0),
        "decode": (plan(vector, "decode"), lambda p, n: in_prompt if p >= n else 0.0),
        "all": (plan(vector, "all"), lambda p, n: in_prompt),
        "both": (plan(vector, "prompt") + plan(other, "decode"), lambda p, n: in_prompt if p < n else in_reply),
    }
    expected = {name: by_hand(model, prompt, push) for name, (_, push) in cases.items()}
    for name, (steering, _) in cases.items():
        with sk.steer(model, steering):
            same(generated(model, prompt[None])[0], expected[name])
    with hooked(model, LAYER, lambda h: h + in_prompt if h.shape[1] == 1 else h):  # whatever is asked for
        silent = generated(model, prompt[None])[0]
    assert [far(silent, expected[name]) for name in cases] == [True, False, True, True]


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_the_first_generated_token_is_steered_as_the_scope_says(
    model: LlamaForCausalLM, vector: Tensor, fuse: str
) -> None:
    prompt = prompt_of(9)
    stock = generated(model, prompt[None])[0, 0]
    scopes: dict[object, Push] = {
        "all": lambda p, n: STRENGTH * vector,
        "prompt": lambda p, n: STRENGTH * vector,
        -1: lambda p, n: STRENGTH * vector if p == n - 1 else 0.0,
        sk.Tokens(start=8): lambda p, n: STRENGTH * vector if p >= 8 else 0.0,
        (0, 3): lambda p, n: STRENGTH * vector if p in (0, 3) else 0.0,
    }
    for scope, push in scopes.items():
        expected = by_hand(model, prompt, push)[0]
        assert far(expected, stock), scope
        with sk.steer(model, plan(vector, scope), fuse=fuse):
            same(generated(model, prompt[None])[0, 0], expected)
    for scope in ("decode", sk.Tokens(start=9)):  # the first reply is chosen before its token is written
        with sk.steer(model, plan(vector, scope), fuse=fuse, backend="reference"):
            assert torch.equal(generated(model, prompt[None])[0, 0], stock)
    late = by_hand(model, prompt, lambda p, n: STRENGTH * vector if p >= n else 0.0)[0]  # off by one
    assert far(late, by_hand(model, prompt, scopes[-1])[0])


@pytest.mark.parametrize("side", ["none", "left"])
def test_token_indices_do_not_raise_in_generate(model: LlamaForCausalLM, vector: Tensor, side: str) -> None:
    ids, mask = batch_of(side)
    indices = (0, -2, 3)
    with sk.steer(model, plan(vector, indices)):
        found = generated(model, ids, attention_mask=mask)
    for row in range(3):
        prompt = ids[row][mask[row] == 1]
        push: Push = lambda p, n: STRENGTH * vector if p in (0, 3, n - 2) else 0.0  # noqa: E731
        same(found[row], by_hand(model, prompt, push))

    def indexed(h: Tensor) -> Tensor:
        h[:, list(indices)] += STRENGTH * vector
        return h

    with hooked(model, LAYER, indexed), pytest.raises(IndexError):
        generated(model, ids, attention_mask=mask)


# 6-7: batches


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_every_row_of_a_batch_is_written_not_only_row_0(model: LlamaForCausalLM, vector: Tensor, fuse: str) -> None:
    ids = batch_of()[0]
    with sk.steer(model, plan(vector), fuse=fuse), written(model) as seen:
        found = logits(model, ids)
        assert rows_of(seen[0]) == [[True] * 9] * 3
    with hooked(model, LAYER, lambda h: h + STRENGTH * vector):
        for row in range(3):
            same(found[row], logits(model, ids[row : row + 1])[0])

    def first(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0][0] += STRENGTH * vector

    handle = model.model.layers[LAYER].register_forward_pre_hook(first)
    with written(model) as seen:
        wrong = logits(model, ids)
        assert [all(row) for row in rows_of(seen[0])] == [True, False, False]
    handle.remove()
    assert far(wrong[1:], found[1:])


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_batch_without_an_attention_mask_or_with_padding_on_either_side(
    model: LlamaForCausalLM, vector: Tensor, side: str
) -> None:
    ids, mask = batch_of(side)
    given = {} if side == "none" else {"attention_mask": mask}
    with sk.steer(model, plan(vector)), written(model) as seen:
        found = logits(model, ids, **given)
        assert rows_of(seen[0]) == (mask == 1).tolist()
    with hooked(model, LAYER, lambda h: h + STRENGTH * vector):
        for row in range(3):
            real = mask[row] == 1
            same(found[row][real], logits(model, ids[row][real][None])[0])

    def masked(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        kwargs["position_ids"].reshape(*args[0].shape[:2], 1)

    handle = model.model.layers[LAYER].register_forward_pre_hook(masked, with_kwargs=True)
    with pytest.raises(RuntimeError, match="shape"):
        logits(model, ids)
    handle.remove()


# 8-10: state


def test_a_second_model_does_not_see_the_first_models_vectors(model: LlamaForCausalLM, ids: Tensor) -> None:
    second, third = tiny_llama(seed=1), tiny_llama()
    stock = logits(third, ids)
    expected = {}
    for name, one, vector in (("first", model, unit(1)), ("second", second, unit(2))):
        with hooked(one, LAYER, lambda h, v=vector: h + STRENGTH * v):
            expected[name] = logits(one, ids)
    with sk.steer(model, plan(unit(1))), sk.steer(second, plan(unit(2))):
        same(logits(model, ids), expected["first"])
        same(logits(second, ids), expected["second"])
        same(logits(model, ids), expected["first"])
        assert torch.equal(logits(third, ids), stock)

    class Steer:
        vectors: list[Tensor] = []  # noqa: RUF012 - the mistake

        def __init__(self, of: LlamaForCausalLM) -> None:
            self.hook = hooked(of, LAYER, lambda h: h + STRENGTH * sum(Steer.vectors, torch.zeros(WIDTH)))

    first, other = Steer(model), Steer(third)
    first.vectors.append(unit(1))
    with first.hook, other.hook:
        assert far(logits(third, ids), stock)


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_layers_do_not_all_get_the_last_layers_vector(model: LlamaForCausalLM, ids: Tensor, fuse: str) -> None:
    vectors = {layer: STRENGTH * unit(20 + layer) for layer in range(LAYERS)}
    with contextlib.ExitStack() as stack:
        for layer, vector in vectors.items():
            stack.enter_context(hooked(model, layer, lambda h, v=vector: h + v))
        expected = logits(model, ids)
    with sk.steer(model, sk.Plan(sk.add(sk.Directions.of(vectors))), fuse=fuse):
        same(logits(model, ids), expected)
    with contextlib.ExitStack() as stack:
        for layer, vector in vectors.items():
            stack.enter_context(hooked(model, layer, lambda h: h + vector))  # noqa: B023 - the mistake
        assert far(logits(model, ids), expected)


KINDS: dict[str, Callable[[Tensor, Tensor], sk.Edit]] = {
    "add": lambda v, w: sk.add(v, STRENGTH),
    "ablate": lambda v, w: sk.ablate(v),
    "ablate rank 2": lambda v, w: sk.ablate([v, w]),
    "clamp": lambda v, w: sk.clamp(v, 2.0),
    "cap": lambda v, w: sk.cap(v, hi=-1.0),
    "rotate": lambda v, w: sk.rotate(v, w, 70.0),
}
STRENGTHS: dict[str, Callable[[Tensor, Tensor, float], sk.Edit]] = {
    "add": lambda v, w, s: sk.add(v, STRENGTH * s),
    "ablate": lambda v, w, s: sk.ablate(v, 0.6 * s),
    "clamp": lambda v, w, s: sk.clamp(v, 2.0 * s),
    "cap": lambda v, w, s: sk.cap(v, hi=-1.0 * s),
    "rotate": lambda v, w, s: sk.rotate(v, w, 70.0 * s),
}


def moved(model: LlamaForCausalLM, ids: Tensor, steering: sk.Plan, scale: float | None = None) -> Tensor:
    """What a plan adds to the rows ``[B, S, H]`` at its layer."""
    with sk.steer(model, steering) as session, written(model) as seen:
        if scale is not None:
            session.set(steering.name, scale=scale)
        logits(model, ids)
        return seen[0][1] - seen[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_multiplier_is_never_ignored(model: LlamaForCausalLM, ids: Tensor, vector: Tensor, kind: str) -> None:
    edit = KINDS[kind](vector, unit(9))
    whole = moved(model, ids, sk.Plan(edit, layers=LAYER))
    assert float(whole.abs().max()) > 0.5
    for scale in (-1.0, 0.5, 2.0):
        ways = (
            moved(model, ids, sk.Plan(edit, layers=LAYER, scale=scale)),
            moved(model, ids, sk.Plan(edit, layers=LAYER).scaled(scale)),
            moved(model, ids, sk.Plan(edit, layers=LAYER), scale),
            moved(model, ids, sk.Plan(edit, layers=LAYER, scale=2.0), 0.5 * scale),
        )
        for found in ways:  # rounding of a state of size 5
            torch.testing.assert_close(found, scale * whole, atol=1e-5, rtol=0)
    assert float(moved(model, ids, sk.Plan(edit, layers=LAYER), 0.0).abs().max()) == 0.0
    for never in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be finite and not 0"):
            sk.Plan(edit, scale=never)

    def ablated(h: Tensor, multiplier: float) -> Tensor:  # takes a multiplier and forgets it
        return h - (h @ vector)[..., None] * vector

    results = []
    for multiplier in (0.5, 2.0):
        with hooked(model, LAYER, lambda h, m=multiplier: ablated(h, m)):
            results.append(logits(model, ids))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_the_strength_of_an_edit_is_never_ignored(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, kind: str
) -> None:
    def result(strength: float) -> Tensor:
        with sk.steer(model, sk.Plan(STRENGTHS[kind](vector, unit(9), strength), layers=LAYER)):
            return logits(model, ids)

    weak, whole, strong = (result(strength) for strength in (0.5, 1.0, 1.5))
    assert far(weak, whole)
    assert far(whole, strong)
    assert far(weak, strong)


@pytest.mark.parametrize("held", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_directions_of_another_dtype_than_the_model(ids: Tensor, vector: Tensor, held: torch.dtype, fuse: str) -> None:
    model = tiny_llama().to(torch.bfloat16)
    given = vector.to(held)
    steering = sk.Plan(sk.add(given, STRENGTH), layers=LAYER)
    with sk.steer(model, steering, fuse=fuse), written(model) as seen:
        logits(model, ids)
    before, after = seen[0]
    assert after.dtype == torch.bfloat16
    exact = before.double() + STRENGTH * given.double()
    # fp32 maths and one rounding to 8 bits
    torch.testing.assert_close(after.double(), exact, atol=1e-6, rtol=2**-8)
    with hooked(model, LAYER, lambda h: h + STRENGTH * vector), pytest.raises(RuntimeError, match="dtype"):
        logits(model, ids)


# 11-17: architectures


class Bypass(nn.Module):
    """A block that runs the code of another without being it, as another graph builder would."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.copy = type(block)(block.self_attn.config, block.self_attn.layer_idx)
        self.copy.load_state_dict(block.state_dict())

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.copy(*args, **kwargs)


def test_a_plan_that_touches_no_module_is_not_silently_ignored(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor
) -> None:
    stock = logits(model, ids)
    for wrong, message in (
        (plan(vector, layers=[LAYERS]), r"layer 4: the model has 4 decoder layers \(0..3\)"),
        (plan(unit(1, WIDTH + 16)), "plan 'p' has width 64, the model has 48"),
    ):
        with pytest.raises(sk.PlanError, match=message):
            sk.steer(model, wrong)
    parallel = families.build(next(f for f in families.FAMILIES if f.name == "phi"))
    with pytest.raises(sk.PlanError, match=r"resid_mid\[1\]: no such site; this block has resid_pre"):
        sk.steer(parallel, sk.Plan(sk.add(unit(1, families.WIDTH)), layers=1, site="resid_mid"))
    with pytest.raises(TypeError, match="steerkern steers transformers models, got Linear"):
        sk.steer(nn.Linear(WIDTH, WIDTH), plan(vector))

    steered = model.model.layers[LAYER]
    hook = hooked(model, LAYER, lambda h: h + STRENGTH * vector)
    hook.__enter__()
    model.model.layers[LAYER] = Bypass(steered)
    assert torch.equal(logits(model, ids), stock)  # what a hook does about it: nothing
    model.model.layers[LAYER] = steered
    hook.__exit__(None, None, None)

    with pytest.raises(sk.PlanError, match="plan 'p' wrote no token"), sk.steer(model, plan(vector)):
        model.model.layers[LAYER] = Bypass(steered)
        same(logits(model, ids), stock)
        model.model.layers[LAYER] = steered
    with sk.steer(model, plan(vector, layers="all")) as session:
        model.model.layers[LAYER] = Bypass(steered)
        logits(model, ids)
        model.model.layers[LAYER] = steered
        assert [site.layer for site in session.receipt()["p"].sites] == [0, 1, 3]


@contextlib.contextmanager
def entering(blocks: Mapping[nn.Module, Change]) -> Iterator[None]:
    """The state that enters each block replaced by ``change`` of it, in any family."""

    def hook_of(change: Change) -> Callable[..., object]:
        def hook(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return hook

    handles = [b.register_forward_pre_hook(hook_of(change), with_kwargs=True) for b, change in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def leaving(block: nn.Module, change: Change) -> Iterator[None]:
    """The state that a block returns replaced by ``change`` of it, whether it comes bare or in a tuple."""

    def hook(block: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def family(name: str) -> tuple[nn.Module, Anatomy, Tensor]:
    model = families.build(next(f for f in families.FAMILIES if f.name == name))
    ids = torch.randint(3, families.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    return model, examine(model), ids


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of sums in a few norms, relative 2e-7 each, which random layers amplify."""
    torch.testing.assert_close(found, expected, atol=5e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_fused_experts_are_not_skipped(name: str, fuse: str) -> None:
    model, anatomy, ids = family(name)
    experts = [p for n, p in model.named_parameters() if n.endswith("experts.down_proj")]
    vector = unit(1, families.WIDTH)
    ablated: Change = lambda h: h - (h * vector).sum(-1, keepdim=True) * vector  # noqa: E731
    outputs: list[Tensor] = []
    saving = [b.register_forward_hook(lambda block, args, output: outputs.append(output)) for b in anatomy.blocks]
    steering = sk.Plan(sk.ablate(vector), site="resid_post", layers="all", name="p")
    with sk.steer(model, steering, fuse=fuse) as session:
        found = logits(model, ids, use_cache=False)
        assert len(session.receipt()["p"].sites) == len(anatomy.blocks)
    for output in outputs:
        assert float((output @ vector).abs().max()) < 1e-5
    for handle in saving:
        handle.remove()
    with contextlib.ExitStack() as stack:
        for block in anatomy.blocks:
            stack.enter_context(leaving(block, ablated))
        close(found, logits(model, ids, use_cache=False))

    if not experts:  # transformers 4 keeps one Linear per expert
        return
    assert all(p.dim() == 3 for p in experts)
    with torch.no_grad():  # ablation of the weights of every Linear that writes to the residual misses the experts
        for module in anatomy.decoder.modules():
            if isinstance(module, nn.Linear) and module.out_features == families.WIDTH:
                module.weight -= torch.outer(vector, vector @ module.weight)
    outputs.clear()
    with leaving(anatomy.blocks[-1], lambda h: outputs.append(h) or h):
        logits(model, ids, use_cache=False)
    assert float((outputs[0] @ vector).abs().max()) > 0.01


def test_saved_hidden_states_have_a_defined_content(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, backend: str
) -> None:
    """``hidden_states[l]`` is the input of block ``l`` with the edits of ``resid_pre[l]``, also for a user's hooks."""
    last, other = LAYERS - 1, unit(9)
    steering = plan(vector, layers=[0, LAYER]) + sk.Plan(sk.ablate(other), site="resid_post", layers=last)
    push: Change = lambda h: h + STRENGTH * vector  # noqa: E731
    cut: Change = lambda h: h - (h @ other)[..., None] * other  # noqa: E731
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Change:
        change = {0: push, LAYER: push}.get(layer, lambda h: h)
        return lambda h: states.setdefault(layer, change(h))

    blocks = list(model.model.layers)
    with entering({b: keep(i) for i, b in enumerate(blocks)}), leaving(blocks[last], cut):
        normed = model.model(ids).last_hidden_state.detach()

    found: dict[str, tuple[Tensor, ...]] = {}
    for fuse in ALL_FUSE:
        saved: list[Tensor] = []
        early: list[Tensor] = []
        with sk.steer(model, steering, fuse=fuse, backend=backend), torch.no_grad():
            handles = [b.register_forward_hook(lambda block, args, out: saved.append(out)) for b in blocks]  # noqa: B023
            handles += [b.register_forward_hook(lambda block, args, out: early.append(out.clone())) for b in blocks]  # noqa: B023
            out = model(ids, output_hidden_states=True)
            for handle in handles:
                handle.remove()
            kept = [h.clone() for h in (*out.hidden_states, *saved)]
            model(ids.flip(0), output_hidden_states=True)
            model.generate(ids, **GREEDY)
        # nothing that was returned is written again
        assert all(torch.equal(a, b) for a, b in zip((*out.hidden_states, *saved), kept, strict=True))
        found[fuse] = out.hidden_states
        assert len(out.hidden_states) == LAYERS + 1
        for layer in range(LAYERS):
            same(out.hidden_states[layer], states[layer])
        same(out.hidden_states[LAYERS], normed)  # transformers ties the last to the final norm's output
        for layer in range(1, LAYERS):
            assert saved[layer - 1] is out.hidden_states[layer]
        # what a hook copies while it runs is the output before the edits of the next site
        same(early[LAYER - 1], states[LAYER] - STRENGTH * vector)
        assert far(early[last], saved[last])
        assert float((saved[last] @ other).abs().max()) < 1e-5
    for fuse in ("sites", "none"):
        for one, two in zip(found["all"], found[fuse], strict=True):
            same(one, two)


@pytest.mark.parametrize(
    ("name", "shape", "door"),
    [("llama", Tensor, False), ("falcon", tuple, False), ("bloom", tuple, False), ("opt-post-norm", Tensor, True)],
)
@pytest.mark.parametrize("fuse", ["all", "none"])
def test_blocks_that_return_a_tensor_and_blocks_that_return_a_tuple(
    name: str, shape: type, door: bool, fuse: str
) -> None:
    model, anatomy, ids = family(name)
    vector, last = STRENGTH * unit(1, families.WIDTH), len(anatomy.blocks) - 1
    assert next(f.fused is None for f in anatomy.sites if f.site == (last, "resid_post")) == door
    outputs: list[object] = []
    handle = anatomy.blocks[last].register_forward_hook(lambda block, args, output: outputs.append(output))
    stock = logits(model, ids, use_cache=False)
    handle.remove()
    if not isinstance(outputs[0], shape):
        pytest.skip(f"blocks of {name} return a {type(outputs[0]).__name__} in this transformers")
    for layer in (0, last):
        with leaving(anatomy.blocks[layer], lambda h: h + vector):
            expected = logits(model, ids, use_cache=False)
        assert not torch.allclose(expected, stock, atol=1e-2)
        with sk.steer(model, sk.Plan(sk.add(vector), site="resid_post", layers=layer), fuse=fuse):
            close(logits(model, ids, use_cache=False), expected)

    # the first item of whatever comes is row 0 of a bare tensor
    def first_item(block: nn.Module, args: object, output: tuple[Tensor, ...] | Tensor) -> None:
        output[0].add_(vector)

    handle = anatomy.blocks[last].register_forward_hook(first_item)
    wrong = logits(model, ids, use_cache=False)
    handle.remove()
    assert torch.allclose(wrong[1], expected[1], atol=1e-4) == (shape is tuple)


def test_layer_numbers_survive_gguf(model: LlamaForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra steerkern[gguf] is not installed")
    from steerkern.integrations.gguf import read_gguf, write_gguf

    vectors = {layer: STRENGTH * unit(30 + layer) for layer in range(1, LAYERS)}
    write_gguf(sk.Directions.of(vectors, "resid_post"), tmp_path / "v.gguf")
    read = read_gguf(tmp_path / "v.gguf")
    results = []
    for shift in (0, -1):  # -1: the numbers of the file taken as counted from 1
        with contextlib.ExitStack() as stack:
            for layer, vector in vectors.items():
                stack.enter_context(leaving(model.model.layers[layer + shift], lambda h, v=vector: h + v))
            results.append(logits(model, ids))
    expected, shifted = results
    assert far(expected, shifted)
    with sk.steer(model, sk.Plan(sk.add(read), site=read.site)):
        same(logits(model, ids), expected)

    before = sk.Directions.of({layer + 1: vector for layer, vector in vectors.items() if layer + 1 < LAYERS})
    write_gguf(before, tmp_path / "pre.gguf")
    assert before.site == "resid_pre"
    with sk.steer(model, sk.Plan(sk.add(before))):
        kept = logits(model, ids)
    again = read_gguf(tmp_path / "pre.gguf")
    with sk.steer(model, sk.Plan(sk.add(again), site=again.site)):
        same(logits(model, ids), kept)


# 21-22: compile, names


def test_compile_does_not_run_a_second_instance_unsteered(
    vector: Tensor, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    first, second, hooks = (tiny_llama(seed=seed, num_hidden_layers=3) for seed in (0, 1, 2))
    fast, fast_second, fast_hooks = (torch.compile(m, backend="aot_eager") for m in (first, second, hooks))
    stock, stock_second = logits(first, ids), logits(second, ids)
    same(logits(fast, ids), stock)  # the unsteered graph exists now
    with sk.steer(second, plan(vector)):
        expected = logits(second, ids)
        assert far(expected, stock_second)
        same(logits(fast_second, ids), expected)
        same(logits(fast, ids), stock)
        with sk.steer(first, plan(-vector)):
            expected = logits(first, ids)
            assert far(expected, stock)
            same(logits(fast, ids), expected)
        same(logits(fast, ids), stock)
    same(logits(fast_second, ids), stock_second)

    monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", True)  # torch's default
    plain = logits(hooks, ids)
    same(logits(fast_hooks, ids), plain)
    with hooked(hooks, LAYER, lambda h: h + STRENGTH * vector):
        assert far(logits(hooks, ids), plain)
        same(logits(fast_hooks, ids), plain)  # the hook is dropped
    torch._dynamo.reset()


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_a_norm_is_not_taken_for_the_blocks_input_by_its_name(fuse: str) -> None:
    model, anatomy, ids = family("gemma3n_text")
    assert all(hasattr(block, "input_layernorm") for block in anatomy.blocks)
    assert [found.site for found in anatomy.sites if found.fused is not None] == []
    vector, block = STRENGTH * unit(1, families.WIDTH), anatomy.blocks[1]
    with entering({block: lambda h: h + vector}):
        expected = logits(model, ids, use_cache=False)
    with sk.steer(model, sk.Plan(sk.add(vector), layers=1), fuse=fuse):
        close(logits(model, ids, use_cache=False), expected)

    def by_name(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(vector)

    handle = block.input_layernorm.register_forward_pre_hook(by_name)
    wrong = logits(model, ids, use_cache=False)
    handle.remove()
    assert float((wrong - expected).abs().max()) > 1e-2 * float(expected.abs().max())
