"""What the scheduler does with a request does not show in its reply: chunks, preemption, padding."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.asked import Ask, engine, expected, folders, mixed_asks, mixed_plans
from tests.serving.models import LLAMA, saved

pytestmark = pytest.mark.runner
PLANS = mixed_plans()
V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
RUNNER = "vllm.v1.worker.gpu.model_runner" if V2 else "vllm.v1.worker.gpu_model_runner"


def test_a_mixed_batch() -> None:
    model, asks = saved(LLAMA), mixed_asks()
    with engine(model, {"plans": folders(PLANS)}) as served:
        runner = type(served.llm.llm_engine.model_executor.driver_worker.worker.model_runner)
        assert any(base.__module__ == RUNNER for base in runner.__mro__)
        assert served.tokens(asks) == expected(model, PLANS, asks)
        assert served.workers("summary")[0]["requests"] == len([ask for ask in asks if ask.plans])


@pytest.mark.parametrize("tokens", [9, 16])
def test_prompts_in_chunks(tokens: int) -> None:
    model, asks = saved(LLAMA), mixed_asks()
    with engine(model, {"plans": folders(PLANS)}, max_num_batched_tokens=tokens) as served:
        assert served.tokens(asks) == expected(model, PLANS, asks)


def test_requests_that_are_preempted_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[str] = []
    _before(monkeypatch, Scheduler, "_preempt_request", lambda scheduler, request, *_: preempted.append(request))
    numbers = random.Random(0)
    named = ["early", "everywhere", None, "last", "prompted", ["early", "everywhere"]]
    asks = [Ask(tuple(numbers.choices(range(3, 500), k=20 + 3 * i)), plans, 48) for i, plans in enumerate(named)]
    model = saved(LLAMA)
    with engine(model, {"plans": folders(PLANS)}, num_gpu_blocks_override=8, max_model_len=128) as served:
        found = served.tokens(asks)
    assert len(preempted) >= 2
    assert found == expected(model, PLANS, asks)


def test_rows_of_padding_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As captured graphs have them: each forward runs rows after its batch's."""
    padded = _pad_forwards(monkeypatch)
    model, asks = saved(LLAMA), mixed_asks()
    with engine(model, {"plans": folders(PLANS)}) as served:
        assert served.tokens(asks) == expected(model, PLANS, asks)
    assert sum(after > before for before, after in padded) >= 8


def test_parameters_serve_for_several_requests() -> None:
    from vllm import SamplingParams

    model, prompts = saved(LLAMA), [(5, 6, 7), (8, 9)]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, extra_args={"steerkern": "early"})
    with engine(model, {"plans": folders(PLANS)}) as served:
        for _ in range(2):
            made = served.llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
            )
            found = [list(one.outputs[0].token_ids) for one in made]
            assert found == expected(model, PLANS, [Ask(prompt, "early", 8) for prompt in prompts])
    assert params.extra_args == {"steerkern": "early"}


def _before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, told: Callable[..., Any]) -> None:
    stock = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        told(*args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def _pad_forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Round the rows of each forward up to 16; returns where the numbers before and after are noted."""
    noted: list[tuple[int, int]] = []

    def padded(shape: Any) -> Any:
        rows = -(-shape.num_tokens // 16) * 16
        noted.append((shape.num_tokens, rows))
        return dataclasses.replace(shape, num_tokens=rows)

    if V2:
        from vllm.v1.worker.gpu import model_runner

        choose = model_runner.dispatch_cg_and_sync_dp

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            shape, state = choose(*args, **kwargs)
            return padded(shape), state

        monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", dispatch)
    else:
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

        stock = CudagraphDispatcher.dispatch

        def dispatch_v1(*args: Any, **kwargs: Any) -> Any:
            mode, shape = stock(*args, **kwargs)
            return mode, padded(shape)

        monkeypatch.setattr(CudagraphDispatcher, "dispatch", dispatch_v1)
    return noted
