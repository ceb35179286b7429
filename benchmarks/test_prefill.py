"""One forward over a prompt with every layer steered, against the stock model that steers nothing.

``OMP_NUM_THREADS=1 pytest benchmarks/test_prefill.py --benchmark-json=benchmarks/results/prefill.json``. The sides run
in turn and ratios are taken within rounds; ``stock again`` is the noise floor. Many rows at once make eager hooks and
norms allocate large blocks, so the suite ``malloc`` repeats this with an allocator that keeps them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerkern as sk
from benchmarks import effort
from benchmarks.shapes import random_llama
from benchmarks.sides import correct, unsteered, warmed
from steerkern.ops.dispatch import backends
from steerkern.timing import Contender, ablation_hooks, interleave

pytestmark = pytest.mark.skipif(bool(backends()["cpu"]), reason=backends()["cpu"] or "-")
LENGTHS = {"9M": (64, 512, 1024), "34M": (64, 256), "0.5B": (32,)}
SECONDS = {"9M": 8, "34M": 8, "0.5B": 18}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("shape", "length"), [(shape, n) for shape, lengths in LENGTHS.items() for n in lengths])
def test_prefill(benchmark: Any, shape: str, length: int, dtype: torch.dtype) -> None:
    model = random_llama(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (1, length), generator=generator)
    vectors = torch.randn(4, model.config.hidden_size, generator=generator)
    one, four = (sk.Plan(sk.ablate(vectors[:k]), name=f"rank {k}") for k in (1, 4))
    unit = torch.nn.functional.normalize(vectors[0], dim=0)
    correct(model, {"input_ids": ids[:, :16]}, one, unit)

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    contenders = [
        Contender("stock", run),
        Contender("stock again", run),
        Contender("hook K=1", run, lambda: ablation_hooks(model, unit)),
        Contender("fused, unsteered", run, lambda: warmed(model, lambda: unsteered(model, one, 1))),
        Contender("steered K=1", run, lambda: warmed(model, lambda: sk.steer(model, one))),
        Contender("steered K=4", run, lambda: warmed(model, lambda: sk.steer(model, four))),
    ]
    timings = interleave(contenders, rounds=effort.rounds_within(SECONDS[shape], run, len(contenders)), warmup=1)
    ratios = {c.name: [round(x, 4) for x in timings.speedup(c.name, "stock")] for c in contenders[1:]}
    benchmark.extra_info["tokens_per_second"] = {
        c.name: round(timings.rate(c.name, length).median, 2) for c in contenders
    }
    benchmark.extra_info["speedup_over_stock_quartiles"] = ratios
    with sk.steer(model, one):
        benchmark.pedantic(run, rounds=1)
    print(f"\n{shape} {dtype} {length} tokens: " + ", ".join(f"{k} {v[1]:.3f}x" for k, v in ratios.items()))
