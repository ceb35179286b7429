"""Engines in processes of their own: compiled, and with the model split over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.serving.asked import Ask, engine, expected, folders, mixed_asks, mixed_plans
from tests.serving.models import LAYERS, LLAMA, saved

pytestmark = pytest.mark.slow
PLANS = mixed_plans()
COMPILED = {"enforce_eager": False}


@pytest.fixture(autouse=True)
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")


# on a CPU vLLM 0.32 has no pipeline without compilation: it allots what ranks hand on while it warms up for that
@pytest.mark.parametrize(
    "options",
    [COMPILED, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, **COMPILED}],
    ids=["compiled", "tensor parallel", "compiled pipeline"],
)
def test_a_mixed_batch(options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = 2 if any(name.endswith("parallel_size") for name in options) else 1
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if ranks == 2 else "nobind")
    model, asks = saved(LLAMA), mixed_asks()
    with engine(model, {"plans": folders(PLANS), "sites": "all"}, **options) as served:
        assert served.tokens(asks) == expected(model, PLANS, asks)
        assert served.tokens(asks) == expected(model, PLANS, asks), "now from the prefix cache"
        sites = [told["sites"] for told in served.workers("sites")]
    assert len(sites) == ranks
    every = [f"resid_pre[{i}]" for i in range(LAYERS)] + ["resid_mid[2]", f"resid_post[{LAYERS - 1}]"]
    assert sorted({one for several in sites for one in several}) == sorted(every)


def test_compiled_for_the_sites_of_one_plan() -> None:
    model, plans = saved(LLAMA), {"early": PLANS["early"]}
    asks = [Ask(ask.prompt, "early" if i % 2 else None) for i, ask in enumerate(mixed_asks())]
    with engine(model, {"plans": folders(plans), "sites": "plans"}, **COMPILED) as served:
        assert served.tokens(asks) == expected(model, plans, asks)
        assert served.workers("sites")[0]["sites"] == ["resid_pre[1]"]


def test_guessed_tokens_are_taken_back() -> None:
    """Speculative decoding: forwards hold tokens that the request never gets."""
    model, asks = saved(LLAMA), [Ask(ask.prompt * 2, ask.plans, 40) for ask in mixed_asks()]
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(model, {"plans": folders(PLANS)}, speculative_config=guess, disable_log_stats=False) as served:
        assert served.tokens(asks) == expected(model, PLANS, asks)
        counts = {metric.name: metric.value for metric in served.llm.get_metrics() if hasattr(metric, "value")}
    drafted, taken = (counts[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert drafted > taken > 0
