"""Tokens per second of ``generate`` with every layer steered, against the stock model that steers nothing.

``pytest benchmarks/test_decode.py --benchmark-json=benchmarks/results/decode.json``. One thread; each round runs the
stock model, a hand-written ablation hook on every block, our fused norms without an edit, steering with rank 1, 4 and
16, and 256 plans of which every row has its own, in turn, and ratios are taken within rounds. ``stock again`` is the
stock model once more: the noise floor. The prompt is one token, so that every forward is a decode step; sessions attach
before the clock starts.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlamaForCausalLM

import steerkern as sk
from benchmarks import effort
from benchmarks.shapes import SHAPES, random_llama
from benchmarks.sides import a_plan_each, correct, independent, unsteered
from steerkern.ops.dispatch import backends
from steerkern.timing import Contender, ablation_hooks, generate_exactly, interleave

pytestmark = pytest.mark.skipif(bool(backends()["cpu"]), reason=backends()["cpu"] or "-")
GOALS = {"9M": 1.10, "34M": 1.04, "0.5B": 1.03}
"""At batch 1."""
TOKENS = {"9M": {1: 16, 8: 8, 32: 4}, "34M": {1: 12, 8: 6, 32: 3}, "0.5B": {1: 4, 8: 1, 32: 1}}
"""By batch: enough for a session's first step to weigh little."""
ROUNDS = {"9M": 7, "34M": 7, "0.5B": 5}
"""At least so many."""
SECONDS = {"9M": 14, "34M": 14, "0.5B": 30}
PLANS = 256


@functools.lru_cache(maxsize=1)
def checked(shape: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, Tensor]:
    """A model and 16 directions ``[16, H]``, the first of which is ablated as it should be."""
    model, generator = random_llama(shape, dtype), torch.Generator().manual_seed(1)
    vectors = torch.randn(16, model.config.hidden_size, generator=generator)
    prompt = {"input_ids": torch.randint(3, 500, (1, 16), generator=generator)}
    correct(model, prompt, sk.Plan(sk.ablate(vectors[0]), name="first"), normalize(vectors[0], dim=0))
    return model, vectors


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name in GOALS])
def test_decode(benchmark: Any, shape: str, dtype: torch.dtype, batch: int) -> None:
    model, vectors = checked(shape, dtype)
    tokens, generator = TOKENS[shape][batch], torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(3, 500, (batch, 1), generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    one, four, sixteen = (sk.Plan(sk.ablate(vectors[:k]), name=f"rank {k}") for k in (1, 4, 16))
    units = torch.randn(PLANS, vectors.shape[1], generator=generator)
    many = [sk.Plan(sk.ablate(v), name=f"plan {i}") for i, v in enumerate(units)]
    unit = normalize(vectors[0], dim=0)
    independent(model, inputs, many)

    def run() -> Any:
        return generate_exactly(model, inputs, tokens)

    contenders = [
        Contender("stock", run),
        Contender("stock again", run),
        Contender("hook K=1", run, lambda: ablation_hooks(model, unit)),
        Contender("fused, unsteered", run, lambda: unsteered(model, one, batch)),
        Contender("steered K=1", run, lambda: sk.steer(model, one)),
        Contender("steered K=4", run, lambda: sk.steer(model, four)),
        Contender("steered K=16", run, lambda: sk.steer(model, sixteen)),
        Contender(f"{PLANS} plans", run, lambda: a_plan_each(model, many, batch)),
    ]
    rounds = effort.rounds_within(SECONDS[shape], run, len(contenders), least=ROUNDS[shape])
    timings = interleave(contenders, rounds=rounds, warmup=1)
    benchmark.extra_info["tokens_per_second"] = {
        c.name: round(timings.rate(c.name, batch * tokens).median, 2) for c in contenders
    }
    ratios = {c.name: [round(x, 4) for x in timings.speedup(c.name, "stock")] for c in contenders[1:]}
    benchmark.extra_info["speedup_over_stock_quartiles"] = ratios
    benchmark.extra_info["goals"] = {"steered K=1": GOALS[shape]} if batch == 1 else {}
    with sk.steer(model, one):
        benchmark.pedantic(run, rounds=1)
    print(f"\n{shape} {dtype} batch {batch}: " + ", ".join(f"{k} {v[1]:.3f}x" for k, v in ratios.items()))
