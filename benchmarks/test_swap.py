"""What changing who is steered by what costs: the row map of a decode step, many plans.

``OMP_NUM_THREADS=1 pytest benchmarks/test_swap.py --benchmark-json=benchmarks/results/swap.json``; attaching,
strength and swaps of a plan are in ``test_attach.py``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import pytest
import torch

import steerkern as sk
from benchmarks import effort
from benchmarks.shapes import random_llama
from benchmarks.sides import against_itself

GOAL_US, GOAL_MS = 20.0, 1.0
STEPS = 200


class Cache:
    """What a forward asks of a key-value cache."""

    def __init__(self) -> None:
        self.tokens = 0

    def get_seq_length(self) -> int:
        return self.tokens


@pytest.mark.parametrize("plans", [1, 256])
@pytest.mark.parametrize("rows", [1, 8, 32, 256])
def test_row_map_of_a_decode_step(benchmark: Any, rows: int, plans: int) -> None:
    """Goal: at most 20 us before and after each forward."""
    model = random_llama("9M")
    vectors = torch.randn(plans, 256, generator=torch.Generator().manual_seed(0))
    held = [sk.Plan(sk.add(v), name=f"p{i}") for i, v in enumerate(vectors)]
    with sk.steer(model, held, silent="ignore", capacity=sk.Capacity(slots=512, rows=512, entries=4096)) as session:
        session.rows([f"p{i % plans}" for i in range(rows)])
        cache, mask = Cache(), torch.ones(rows, 8, dtype=torch.long)
        calls = session._calls

        def forward(tokens: int) -> None:
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            inputs = {"input_ids": ids, "past_key_values": cache, "attention_mask": mask, "use_cache": True}
            calls.before(model.model, (), inputs)
            calls.after(True)
            cache.tokens += tokens

        forward(8)
        calls.rows.slot.fill_(0)
        forward(1)
        benchmark.pedantic(lambda: forward(1), iterations=50, rounds=effort.rounds(STEPS), warmup_rounds=10)
        session.receipt()
    benchmark.extra_info["again"] = against_itself(benchmark)
    empty = statistics.median(
        _seconds(lambda: torch.zeros(rows, 1, dtype=torch.long)) for _ in range(effort.rounds(STEPS))
    )
    benchmark.extra_info |= {"goal_us": GOAL_US, "of_which_making_the_ids_us": round(1e6 * empty, 2)}
    print(f"\n{rows} rows, {plans} plans: {1e6 * benchmark.stats.stats.median:.1f} us, goal {GOAL_US}")


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.parametrize("others", [0, 255])
@pytest.mark.parametrize("change", ["scale", "add and remove", "swap"])
def test_change_between_decode_steps(benchmark: Any, change: str, others: int) -> None:
    """Goal: under 1 ms beside whatever else is held and used, with the slots that the next forward asks for."""
    vectors = torch.randn(others + 2, 256, generator=torch.Generator().manual_seed(0))
    plans = [sk.Plan(sk.add(v), name=f"p{i}") for i, v in enumerate(vectors)]
    *kept, one, other = plans
    names = itertools.cycle([one, other])
    capacity = sk.Capacity(slots=512, rows=512, entries=16384)
    with sk.steer(random_llama("32 layers"), [*kept, one], silent="ignore", capacity=capacity) as session:
        program = session._program
        for plan in program.plans:
            program.slot([(plan.name, 0)])
        scales, held = itertools.cycle((0.5, 1.0)), [next(names)]

        def scale() -> None:
            session.set(one.name, scale=next(scales))

        def add_and_remove() -> None:
            session.add(other)
            program.slot([(other.name, 0)])
            session.remove(other.name)

        def swap() -> None:
            session.remove(held.pop().name)
            held.append(next(names))
            session.add(held[0])
            program.slot([(held[0].name, 0)])

        run = {"scale": scale, "add and remove": add_and_remove, "swap": swap}[change]
        benchmark.pedantic(run, rounds=effort.rounds(STEPS), warmup_rounds=5)
    benchmark.extra_info |= {"goal_ms": GOAL_MS, "again": against_itself(benchmark)}
    print(f"\n{change} beside {others} plans: {1e3 * benchmark.stats.stats.median:.2f} ms, goal {GOAL_MS}")
