"""What a session costs apart from decoding: attaching, detaching, changing plans, memory.

``pytest benchmarks/test_attach.py --benchmark-json=benchmarks/results/attach.json``
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import tracemalloc
from typing import Any

import pytest
import torch

import steerkern as sk
from benchmarks import effort
from benchmarks.shapes import random_llama
from benchmarks.sides import against_itself
from steerkern.program import Program

GOAL_MS = 20.0
GOAL_BYTES = 1 << 20


@pytest.fixture(scope="module")
def model() -> Any:
    return random_llama("32 layers")


def plan(name: str, seed: int = 0) -> sk.Plan:
    return sk.Plan(sk.ablate(torch.randn(256, generator=torch.Generator().manual_seed(seed))), name=name)


def test_attach_and_detach_of_32_layers(benchmark: Any, model: Any) -> None:
    """Goal: under 20 ms, probe forward included. A plain forward of as many tokens runs beside it."""
    open_plan = plan("open")

    def attach() -> None:
        sk.steer(model, open_plan).detach()

    ids, forwards = torch.zeros(1, 3, dtype=torch.long), []
    attach()
    for _ in range(effort.rounds(20)):
        start = time.perf_counter()
        with torch.no_grad():
            model(ids, use_cache=False)
        forwards.append(1e3 * (time.perf_counter() - start))
        attach()
    benchmark.pedantic(attach, rounds=effort.rounds(40), warmup_rounds=3)
    benchmark.extra_info |= {"goal_ms": GOAL_MS, "again": against_itself(benchmark)}
    benchmark.extra_info["plain_forward_ms"] = round(statistics.median(forwards), 2)
    print(f"\nattach + detach {1e3 * benchmark.stats.stats.median:.1f} ms, goal {GOAL_MS}; {benchmark.extra_info}")


def test_scale_during_decode(benchmark: Any, model: Any) -> None:
    """Goal: a change of strength in under 1 ms."""
    with sk.steer(model, plan("open"), silent="ignore") as session:
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long))
        scales = itertools.cycle((0.5, 1.0))
        benchmark(lambda: session.set("open", scale=next(scales)))


def test_swap_of_a_plan_during_decode(benchmark: Any, model: Any) -> None:
    """Goal: one plan out and another in, used by the next forward, in under 1 ms."""
    plans = itertools.cycle((plan("a", 1), plan("b", 2)))
    with sk.steer(model, next(plans), silent="ignore") as session:
        program: Program = session._program

        def swap() -> None:
            (old,) = program.plans
            session.remove(old.name)
            new = next(plans)
            session.add(new)
            program.slot([(new.name, 0)])

        benchmark(swap)


def test_memory_of_a_session(benchmark: Any, model: Any) -> None:
    """Goal: under 1 MB beside the tables."""
    open_plan = plan("open")
    sk.steer(model, open_plan).detach()
    gc.collect()
    tracemalloc.start()
    session = sk.steer(model, open_plan)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tables = sum(t.nbytes for t in session._program.tables(0)[:3]) + session._program.gain.nbytes
    session.detach()
    benchmark.extra_info |= {
        "python_bytes": held,
        "python_peak_bytes": peak,
        "row_map_bytes": session._rows.slot.nbytes,
        "table_bytes": tables,
        "goal_bytes": GOAL_BYTES,
    }
    benchmark.pedantic(lambda: sk.steer(model, open_plan).detach(), rounds=3)
    print(f"\nmemory: {benchmark.extra_info}")
