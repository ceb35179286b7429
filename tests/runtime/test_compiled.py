"""Static cache and torch.compile with what acts by itself: events, latches, controllers; captured steps on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import steerkern as sk
from benchmarks.gpu import decode, ops
from benchmarks.gpu.device import Device, Gpu
from tests.runtime.models import tiny_llama
from tests.runtime.test_deciding import Stub
from tests.runtime.test_generate import GREEDY, STRENGTH, padded

LAST = 1
COLUMNS = 9
"""Of the prompts that ``padded`` gives."""


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=LAST + 1)


def gains(states: Tensor) -> Tensor:
    """Strengths that differ between prompts by far, and do not between a prompt alone and in a batch."""
    return torch.round(2 * states[:, 0, : LAST + 1]) + torch.tensor([1.0, -1.0])


def guided(vector: Tensor, **options: Any) -> sk.Plan:
    controller = Stub(gains, (sk.Read(LAST, "resid_post"),), tuple(range(LAST + 1)), **options)
    edit = sk.add(vector, STRENGTH)
    return sk.Plan(edit, layers="all", site="resid_post", scope="decode", controller=controller, name="p")


def latched(vector: Tensor) -> sk.Plan:
    term = sk.Term(sk.Read(LAST, "resid_post"), vector, measure="coordinate")
    latch = sk.Latch((sk.Condition((term,), lo=0.0),))
    return sk.Plan(sk.add(vector, STRENGTH), layers="all", scope="decode", latch=latch, name="p")


def event(vector: Tensor) -> sk.Plan:
    scope = sk.Tokens("decode", after=tuple((token,) for token in range(50)), first=3)
    return sk.Plan(sk.add(vector, STRENGTH), layers="all", scope=scope, name="p")


def every_other(vector: Tensor) -> sk.Plan:
    return sk.Plan(sk.add(vector, STRENGTH), layers="all", scope=sk.Tokens("reply", every=2), name="p")


PLANS = {"event": event, "every": every_other, "latch": latched, "controller": guided}


@contextlib.contextmanager
def decode_compiled(model: LlamaForCausalLM, backend: str, graphs: list[int]) -> Iterator[None]:
    """Steps of one token in one graph, prompts as they are: what ``generate`` does by itself on a GPU."""
    torch._dynamo.reset()
    eager = model.forward

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(eager, backend=counting, fullgraph=True)

    def forward(*args: Any, **options: Any) -> Any:
        return (compiled if options["input_ids"].shape[1] == 1 else eager)(*args, **options)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def alone(model: LlamaForCausalLM, plan: sk.Plan | None, scale: float = 1.0) -> list[list[int]]:
    """The reply to each prompt by itself, eager, with a growing cache."""
    ids, mask = padded("left")
    found = []
    for row, real in zip(ids, mask.bool(), strict=True):
        with sk.steer(model, [] if plan is None else plan, silent="ignore") as session:
            if plan is not None:
                session.set(plan.name, scale=scale)
            prompt = row[real][None]
            found.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)[0, prompt.shape[1] :])
    return [reply.tolist() for reply in found]


@pytest.mark.parametrize("compiler", [None, "aot_eager"], ids=["static cache", "compiled"])
@pytest.mark.parametrize("kind", PLANS)
def test_replies_are_those_of_each_prompt_alone(
    small: LlamaForCausalLM, vector: Tensor, kind: str, compiler: str | None
) -> None:
    """Also after the strength changed, and after the plan went and came back, between calls, in the same graph."""
    make, graphs = PLANS[kind], []
    ids, mask = padded("left")
    expected = {scale: alone(small, make(vector), scale) for scale in (1.0, -2.0)}
    plain = alone(small, None)
    assert len({str(replies) for replies in (*expected.values(), plain)}) == 3
    setting = contextlib.nullcontext() if compiler is None else decode_compiled(small, compiler, graphs)

    def replies() -> list[list[int]]:
        made = small.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
        return made[:, COLUMNS:].tolist()

    with sk.steer(small, make(vector), silent="ignore") as session, setting:
        assert replies() == expected[1.0]
        once = len(graphs)
        session.set("p", scale=-2.0)
        assert replies() == expected[-2.0]
        session.remove("p")
        assert replies() == plain
        session.add(make(vector))
        assert replies() == expected[1.0]
        session.set("p", scale=-2.0)
        assert replies() == expected[-2.0]
        assert len(graphs) == once
    assert (once > 0) == (compiler is not None)


def test_a_latch_opens_for_some_of_the_prompts(small: LlamaForCausalLM, vector: Tensor) -> None:
    """So that the test above can fail."""
    same = [one == other for one, other in zip(alone(small, latched(vector)), alone(small, None), strict=True)]
    assert 0 < sum(same) < len(same)


@pytest.mark.parametrize("plan", [latched, guided])
def test_a_compiled_prompt_that_is_to_be_read_raises(
    small: LlamaForCausalLM, vector: Tensor, plan: Callable[[Tensor], sk.Plan]
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="aot_eager")
    with (
        sk.steer(small, plan(vector), silent="ignore"),
        torch.no_grad(),
        pytest.raises(sk.PlanError, match="decides from the prompt in eager forwards only"),
    ):
        compiled(padded("left")[0])


def test_a_controller_of_every_token_raises_in_a_compiled_step(small: LlamaForCausalLM, vector: Tensor) -> None:
    """A graph does not show it the states, so its plan would do nothing."""
    ids, mask = padded("left")
    with (
        sk.steer(small, guided(vector, every_token=True), silent="ignore"),
        decode_compiled(small, "aot_eager", []),
        pytest.raises(sk.PlanError, match="asked at every token in eager forwards only"),
    ):
        small.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)


# captured steps: the same code runs on the CPU, where a captured step is the step itself

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[Device, pytest.param(Gpu, marks=ON_A_GPU)], ids=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


def test_a_captured_launch_follows_plans_strengths_and_rows(device: Device) -> None:
    assert all(all(found.values()) for found in ops.replayed(device).values())


def test_a_captured_step_on_a_static_cache_follows_the_strength(device: Device) -> None:
    with torch.no_grad():
        found = decode.replayed(device, decode.model_of("tiny", device))
    assert found["distance"]
    assert not found["wrong"]
