"""Continuous batching: ``generate_batch`` steered against the stock model, in one run.

``OMP_NUM_THREADS=1 pytest benchmarks/test_serving.py --benchmark-json=benchmarks/results/serving.json``

The manager's thread takes its number of threads from the environment, so that has to say 1.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import steerkern as sk
from benchmarks import effort
from benchmarks.shapes import SHAPES, random_llama
from steerkern.timing import Contender, Quartiles, interleave

pytest.importorskip("transformers", minversion="5.17")
from transformers import ContinuousBatchingConfig

GOAL = 0.98
REQUESTS, TOKENS, ROUNDS = 16, 4 if effort.quick() else 24, 9
GENERATION = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
CONFIG = ContinuousBatchingConfig(page_size=32, max_batch_tokens=256, num_blocks=128)


@pytest.mark.parametrize("shape", ["9M", "34M"])
def test_generate_batch(benchmark: Any, shape: str) -> None:
    """Goal: steered at least 0.98 times as fast as unsteered, with one plan and with one for each request."""
    model: Any = random_llama(shape)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 8000, (16 + i,), generator=generator).tolist() for i in range(REQUESTS)]
    units = torch.randn(REQUESTS, SHAPES[shape]["hidden_size"], generator=generator)
    plans = [sk.Plan(sk.ablate(unit), name=f"p{i}") for i, unit in enumerate(units)]

    def run() -> list[list[int]]:
        made = model.generate_batch(prompts, generation_config=GENERATION, continuous_batching_config=CONFIG)
        return [output.generated_tokens for output in made.values()]

    @contextmanager
    def rows(names: list[str | None]) -> Any:
        with sk.steer(model, plans, silent="ignore") as session:
            session.rows(names)
            yield session

    ways: dict[str, list[str | None]] = {
        "one plan": ["p0"] * REQUESTS,
        "half plain": ["p0", None] * (REQUESTS // 2),
        "a plan each": [plan.name for plan in plans],
    }
    if effort.quick():
        ways = {"a plan each": ways["a plan each"]}
    for names in ways.values():
        with rows(names) as session:
            found = run()
            session.rows(None)
            for i in (0, 1):
                session.rows([names[i]])
                ids = torch.tensor([prompts[i]])
                alone = model.generate(ids, generation_config=GENERATION)[0, ids.shape[1] :].tolist()
                assert found[i] == alone, "a request differs from its solo run"
    contenders = [Contender("stock", run), Contender("stock again", run)]
    contenders += [Contender(name, run, lambda names=names: rows(names)) for name, names in ways.items()]
    timings = interleave(contenders, rounds=effort.rounds(ROUNDS), warmup=effort.warmup())
    ratios = {name: timings.speedup(name, "stock") for name in timings.seconds if name != "stock"}
    benchmark.extra_info |= {
        "tokens_per_second": {name: timings.rate(name, REQUESTS * TOKENS).median for name in timings.seconds},
        "speedup_over_stock_quartiles": {name: list(map(_short, found)) for name, found in ratios.items()},
        "goals": dict.fromkeys(ways, GOAL),
    }
    with rows(ways["a plan each"]):
        benchmark.pedantic(run, rounds=1)
    print(f"\n{shape}: " + ", ".join(f"{name} {_text(found)}" for name, found in ratios.items()))


def _short(value: float) -> float:
    return round(value, 3)


def _text(found: Quartiles) -> str:
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"
