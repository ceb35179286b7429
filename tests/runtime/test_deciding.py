"""Two-phase requests: what a prompt's states decide holds for that prompt's tokens, and for nobody else's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import steerkern as sk
from steerkern.decisions import Read
from tests.runtime.models import LAYERS, WIDTH
from tests.runtime.test_generate import GREEDY, NEW, padded

TOLERANCE = 1e-3  # as in test_generate: the kernel's norms sum in another order than torch's
ALPHA = 2.5


@dataclasses.dataclass(eq=False)
class Stub:
    """A controller whose gains are a function of the states that it is shown."""

    rule: Callable[[Tensor], Tensor]
    reads: tuple[Read, ...] = (Read(LAYERS - 1, "resid_post"),)
    layers: tuple[int, ...] = tuple(range(LAYERS))
    width: int = WIDTH
    every_token: bool = False
    seen: list[Tensor] = dataclasses.field(default_factory=list)

    def gains(self, states: Tensor) -> Tensor:
        self.seen.append(states)
        return self.rule(states)

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise NotImplementedError


def fixed(*per_row: list[float]) -> Callable[[Tensor], Tensor]:
    return lambda states: torch.tensor(per_row)[: len(states)]


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    return padded("left")


def unpadded(prompts: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [row[mask == 1] for row, mask in zip(*prompts, strict=True)]


@contextlib.contextmanager
def added(model: LlamaForCausalLM, amounts: dict[int, Tensor], written: Tensor) -> Iterator[None]:
    """``resid_post[l] += amounts[l]`` on the tokens that are ``written [S]``, by plain hooks."""

    def after(layer: int) -> Callable[..., Tensor]:
        return lambda block, args, output: output + amounts[layer] * written[None, :, None]

    handles = [model.model.layers[layer].register_forward_hook(after(layer)) for layer in amounts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expected(
    model: LlamaForCausalLM, prompt: Tensor, amounts: dict[int, Tensor], begins: int
) -> tuple[list[int], Tensor]:
    """Greedy reply and logits, in full at each step; tokens from position ``begins`` on are written."""
    ids, logits = prompt[None], []
    for _ in range(NEW):
        written = (torch.arange(ids.shape[1]) >= begins).float()
        with added(model, amounts, written), torch.no_grad():
            logits.append(model(ids, use_cache=False).logits[0, -1])
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], 1)
    return ids[0, len(prompt) :].tolist(), torch.stack(logits)


def weighted(vector: Tensor, controller: Any, scope: Any = "decode", name: str = "guided") -> sk.Plan:
    return sk.Plan(
        sk.add(vector, ALPHA), layers="all", site="resid_post", scope=scope, controller=controller, name=name
    )


GAINS = fixed([0.5, 0.0, -1.0, 2.0], [0.0] * LAYERS, [1.0, 0.25, 0.75, -0.5])
ROWS = GAINS(torch.zeros(3, 1, WIDTH))


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("scope", ["decode", "reply"])
def test_every_row_decodes_under_its_own_gains(
    model: LlamaForCausalLM, vector: Tensor, prompts: tuple[Tensor, Tensor], scope: str, cache: str, backend: str
) -> None:
    """Acceptance 1, 2, 6 of the guided controller: injected is alpha * s * w_l * d per layer, and the prompt keeps."""
    ids, mask = prompts
    options = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(cache, {})
    with sk.steer(model, weighted(vector, Stub(GAINS), scope), backend=backend):
        out = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY, **options
        )
    logits = torch.stack(out.logits, 1)
    for row, prompt in enumerate(unpadded(prompts)):
        amounts = {layer: ALPHA * float(ROWS[row, layer]) * vector for layer in range(LAYERS)}
        tokens, wanted = expected(model, prompt, amounts, len(prompt) - (scope == "reply"))
        assert out.sequences[row, 9:].tolist() == tokens, f"row {row}"
        torch.testing.assert_close(logits[row], wanted, atol=TOLERANCE, rtol=0)
    plain = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY)
    first = (logits[0, 0] - plain.logits[0][0]).abs().max()
    assert first < TOLERANCE if scope == "decode" else first > 20 * TOLERANCE


def test_a_row_with_no_gain_keeps_the_stock_reply_bit_for_bit(
    model: LlamaForCausalLM, vector: Tensor, prompts: tuple[Tensor, Tensor]
) -> None:
    ids, mask = prompts
    with sk.steer(model, weighted(vector, Stub(GAINS)), backend="reference", fuse="none"):
        steered = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY
        ).logits
    stock = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY).logits
    assert all(torch.equal(a[1], b[1]) for a, b in zip(steered, stock, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(steered, stock, strict=True))


@pytest.mark.parametrize("scope", ["decode", "reply"])
def test_the_controller_sees_the_last_prompt_token_of_the_stock_model(
    model: LlamaForCausalLM, vector: Tensor, prompts: tuple[Tensor, Tensor], scope: str
) -> None:
    ids, mask = prompts
    last_block = Read(LAYERS - 1, "resid_post")
    stub = Stub(GAINS, (Read(1, "resid_pre", -2), Read(2, "resid_post"), last_block, Read(0, "resid_mid", "mean")))
    with sk.steer(model, weighted(vector, stub, scope)):
        model.generate(ids, attention_mask=mask, **GREEDY)
    assert len(stub.seen) == 1
    for row, prompt in enumerate(unpadded(prompts)):
        kept: dict[str, Tensor] = {}
        model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, kept=kept: kept.setdefault("mid", args[0].clone())
        )
        last = model.model.layers[-1].register_forward_hook(
            lambda _, __, out, kept=kept: kept.setdefault("last", out.clone())
        )
        with torch.no_grad():
            states = model(prompt[None], output_hidden_states=True).hidden_states
        last.remove()
        model.model.layers[0].post_attention_layernorm._forward_pre_hooks.clear()
        wanted = torch.stack([states[1][0, -2], states[3][0, -1], kept["last"][0, -1], kept["mid"][0].mean(0)])
        torch.testing.assert_close(stub.seen[0][row], wanted, atol=1e-4, rtol=0)


def test_one_controller_call_per_request_and_beams_share_it(
    model: LlamaForCausalLM, vector: Tensor, prompts: tuple[Tensor, Tensor]
) -> None:
    ids, mask = prompts
    stub = Stub(GAINS)
    options = {**GREEDY, "num_beams": 2, "num_return_sequences": 2}
    with sk.steer(model, weighted(vector, stub)):
        cached = model.generate(ids, attention_mask=mask, **options)
    assert [len(states) for states in stub.seen] == [3]
    for row in range(3):
        with sk.steer(model, weighted(vector, Stub(fixed(ROWS[row].tolist())))):
            alone = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(cached[2 * row : 2 * row + 2], alone)


def test_slots_of_ended_requests_come_back(model: LlamaForCausalLM, vector: Tensor, ids: Tensor) -> None:
    """Thirty requests of three rows in a table of four slots."""
    stub = Stub(GAINS)
    with sk.steer(model, weighted(vector, stub), capacity=sk.Capacity(4, 64, 8)) as session:
        first = model.generate(ids, **GREEDY)
        for _ in range(29):
            assert torch.equal(model.generate(ids, **GREEDY), first)
        assert not session._program._gains or len(session._program._gains) <= 3
        with pytest.raises(sk.PlanError, match="plans 'guided' need a slot, all 4 are taken"):
            stub.rule = lambda states: torch.ones(len(states), LAYERS)
            model.generate(ids.repeat(2, 1), **GREEDY)
        stub.rule = GAINS
        assert torch.equal(model.generate(ids, **GREEDY), first)


def test_every_token_mode_steers_only_what_follows_the_last_read(
    model: LlamaForCausalLM, vector: Tensor, ids: Tensor
) -> None:
    """Finding 1 of the guided controller: late read layers leave only the last one to write; early ones leave more."""
    for read, written in ((LAYERS - 1, [LAYERS - 1]), (1, [1, 2, 3])):
        stub = Stub(lambda s: torch.ones(len(s), LAYERS), (Read(read, "resid_post"),), every_token=True)
        with sk.steer(model, weighted(vector, stub, "reply")), torch.no_grad():
            logits = model(ids).logits
        amounts = dict.fromkeys(written, ALPHA * vector)
        last = (torch.arange(ids.shape[1]) == ids.shape[1] - 1).float()
        with added(model, amounts, last), torch.no_grad():
            torch.testing.assert_close(logits, model(ids).logits, atol=TOLERANCE, rtol=0)
        with sk.steer(model, weighted(vector, stub, "reply")):
            model.generate(ids, **GREEDY)
        assert len(stub.seen) == 1 + NEW


# latches


def separating(
    model: LlamaForCausalLM, prompts: list[Tensor], layer: int, token: int | str
) -> tuple[Tensor, list[float]]:
    """A direction on which the prompts differ, and the coordinate of each."""
    means = []
    for prompt in prompts:
        with torch.no_grad():
            state = model(prompt[None], output_hidden_states=True).hidden_states[layer][0]
        means.append(state.mean(0) if token == "mean" else state[int(token)])
    direction = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    return direction, [float(m @ direction) for m in means]


@pytest.mark.parametrize("scope", ["decode", "all", "prompt"])
@pytest.mark.parametrize("token", ["mean", -1])
def test_a_latch_opens_for_its_own_rows_and_stays(
    model: LlamaForCausalLM, vector: Tensor, prompts: tuple[Tensor, Tensor], scope: str, token: Any
) -> None:
    """Acceptance 7 of the baselines: fired in prefill, on for every decode step of that request and of no other."""
    ids, mask = prompts
    alone = unpadded(prompts)
    direction, coordinates = separating(model, alone, 1, token)
    threshold = (max(coordinates) + sorted(coordinates)[1]) / 2
    fires = [x > threshold for x in coordinates]
    assert sorted(fires) == [False, False, True]
    term = sk.Term(Read(1, "resid_pre", token), direction, measure="coordinate")
    latch = sk.Latch((sk.Condition((term,), lo=threshold),))
    edit = sk.add(vector, 20.0)
    plan = sk.Plan(edit, layers=[2], scope=scope, latch=latch, name="gated")
    always = sk.Plan(edit, layers=[2], scope=scope, name="always")
    with sk.steer(model, plan) as session:
        out = model.generate(ids, attention_mask=mask, **GREEDY)
        assert set(session.receipt()["gated"].rows) == {fires.index(True)}
    for row, prompt in enumerate(alone):
        stock = model.generate(prompt[None], **GREEDY)[0, len(prompt) :]
        with sk.steer(model, always):
            steered = model.generate(prompt[None], **GREEDY)[0, len(prompt) :]
        assert not torch.equal(stock, steered)
        assert torch.equal(out[row, 9:], steered if fires[row] else stock), f"row {row}"


def test_rules_combine_conditions_and_plans(
    model: LlamaForCausalLM, vector: Tensor, prompts: tuple[Tensor, Tensor]
) -> None:
    ids, mask = prompts
    alone = unpadded(prompts)
    direction, x = separating(model, alone, 1, -1)
    order = sorted(range(3), key=lambda i: x[i])
    low, high = (x[order[0]] + x[order[1]]) / 2, (x[order[1]] + x[order[2]]) / 2

    def condition(**bounds: float) -> sk.Condition:
        return sk.Condition((sk.Term(Read(1), direction, measure="coordinate"),), **bounds)

    middle = sk.Latch((condition(lo=low), condition(hi=high)), "all")
    outer = sk.Latch((condition(hi=low), condition(lo=high)), "any")
    one = sk.Plan(sk.add(vector, 3.0), layers=[2], latch=middle, name="middle")
    two = sk.Plan(sk.add(vector, -3.0), layers=[2], latch=outer, name="outer")
    with sk.steer(model, [one, two]) as session:
        model.generate(ids, attention_mask=mask, **GREEDY)
        receipt = session.receipt()
    assert set(receipt["middle"].rows) == {order[1]}
    assert set(receipt["outer"].rows) == {order[0], order[2]}


def test_cast_similarity_is_never_negative_and_near_the_cosine() -> None:
    """Acceptance 6 of the baselines."""
    generator = torch.Generator().manual_seed(0)
    states, c = torch.randn(64, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    value = sk.Term(Read(0), c, measure="cast").value(states * 1e-2)
    cosine = torch.nn.functional.cosine_similarity(states, c[None])
    assert float(value.min()) >= 0
    torch.testing.assert_close(value, cosine.abs(), atol=1e-3, rtol=0)
    above, below = sk.cast(c, 0, 0.1), sk.cast(c, 0, 0.1, fires="below")
    by_read = {above.terms[0].read: states * 1e-2}
    assert torch.equal(above.holds(by_read), ~below.holds(by_read))


# refusals


def test_a_session_that_saw_no_prompt_cannot_decide(model: LlamaForCausalLM, vector: Tensor, ids: Tensor) -> None:
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with (
            sk.steer(model, weighted(vector, Stub(GAINS)), silent="ignore"),
            pytest.raises(sk.PlanError, match="the prompt ran before this session saw it"),
        ):
            model(ids[:, :1], past_key_values=cache)


def test_a_prompt_in_chunks_is_read_once_it_is_whole(model: LlamaForCausalLM, vector: Tensor, ids: Tensor) -> None:
    stub = Stub(GAINS, (Read(2, "resid_post"), Read(1, "resid_pre", "mean")))
    with sk.steer(model, weighted(vector, stub)):
        whole = model.generate(ids, **GREEDY)
        chunks = model.generate(ids, prefill_chunk_size=4, **GREEDY)
    assert torch.equal(whole, chunks)
    torch.testing.assert_close(stub.seen[0], stub.seen[1], atol=1e-4, rtol=0)
    with (
        sk.steer(model, weighted(vector, stub, "reply"), silent="ignore"),
        pytest.raises(sk.PlanError, match="needs the whole prompt in one forward"),
    ):
        model.generate(ids, prefill_chunk_size=4, **GREEDY)


def test_controllers_that_do_not_fit_are_refused_before_anything_changes(
    model: LlamaForCausalLM, vector: Tensor
) -> None:
    narrow = Stub(GAINS, width=WIDTH - 1)
    with pytest.raises(sk.PlanError, match=f"the controller reads width {WIDTH - 1}, the edits have {WIDTH}"):
        weighted(vector, narrow)
    with pytest.raises(sk.PlanError, match="layer 3: the controller weighs layers"):
        sk.Plan(sk.add(vector), layers=[3], controller=Stub(GAINS, layers=(0, 1)))
    for stub, text in (
        (Stub(GAINS, layers=(0, 1)), "layer 2: the controller weighs layers .*plan 'guided'"),
        (Stub(GAINS, (Read(9, "resid_post"),)), "layer .*: the model has 4 decoder layers .*plan 'guided'"),
    ):
        with pytest.raises(sk.PlanError, match=text):
            sk.steer(model, weighted(vector, stub))
    assert type(model) is LlamaForCausalLM


def test_two_controllers_cannot_meet_on_one_row(model: LlamaForCausalLM, vector: Tensor, ids: Tensor) -> None:
    plans = [weighted(vector, Stub(GAINS), name=name) for name in ("one", "two")]
    with sk.steer(model, plans, silent="ignore") as session:
        with pytest.raises(sk.PlanError, match=r"plans 'one\+two' meet on one row, and each brings a controller"):
            model.generate(ids, **GREEDY)
        session.rows(["one", "two", None])
        model.generate(ids, **GREEDY)


def test_a_plan_with_a_latch_comes_back_from_a_folder(tmp_path: Any, vector: Tensor) -> None:
    latch = sk.Latch((sk.cast(vector, 1, 0.2), sk.cast(-vector, 2, 0.3, fires="below", token=-1)), "all")
    sk.Plan(sk.add(vector), latch=latch, name="p").save_pretrained(tmp_path)
    back = sk.Plan.from_pretrained(tmp_path).steps[0].latch
    assert back is not None
    assert (back.rule, back.reads) == (latch.rule, latch.reads)
    states = torch.randn(32, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.opens(states), latch.opens(states))
    assert 0 < int(latch.opens(states).sum()) < 32
