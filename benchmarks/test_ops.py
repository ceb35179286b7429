"""The fused op on the CPU, one thread, against what it replaces and against what the machine can do.

``pytest benchmarks/test_ops.py --benchmark-json=benchmarks/results/ops.json``. Every comparison runs its sides in turn,
so that a slow moment hits all of them; ratios are taken within turns. Nothing here fails for being
slow, everything fails for being wrong.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import effort
from benchmarks.norms import EPS, Fused, RMSNorm, ablation, close, gate
from steerkern.ops import cpu
from steerkern.ops.schemas import Norm
from steerkern.timing import Timings

pytestmark = pytest.mark.skipif(bool(cpu.unusable()), reason=cpu.unusable() or "-")


def interleaved(sides: dict[str, Callable[[], Any]], seconds: float) -> Timings:
    """Seconds of each side, run in turn; short calls are timed in groups of about 50 us.

    The order is drawn anew in each turn: whoever follows an eager side finds cold caches.
    """

    def clock(run: Callable[[], Any], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    # the best of several, so that the same thing twice gets groups of one size
    repeats = {name: max(1, int(50e-6 / min(clock(run, 1) for _ in range(7)))) for name, run in sides.items()}
    dice = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 9:
        for name in dice.sample(list(sides), len(sides)):
            times[name].append(clock(sides[name], repeats[name]))
    return Timings({name: tuple(values) for name, values in times.items()})


def record(
    benchmark: Any,
    run: Callable[[], Any],
    sides: dict[str, Callable[[], Any]],
    goals: dict[str, str] | None = None,
    **ratios: tuple[str, str],
) -> None:
    """Time ``run`` for the benchmark's own table, ``sides`` in turn for ``ratios``: numerator and denominator.

    The first side runs a second time in each turn: ``again`` is the noise floor. ``goals`` of ratios are bounds such as
    ``"<= 1.05"``.
    """
    first = next(iter(sides))
    again = f"{first} again"
    timings = interleaved({**sides, again: sides[first]}, effort.seconds(1.5))
    medians = {name: 1e6 * timings.time(name).median for name in timings.seconds}
    benchmark.extra_info["median_us"] = {name: round(value, 2) for name, value in medians.items()}
    quartiles = {name: timings.speedup(below, above) for name, (above, below) in ratios.items()}
    benchmark.extra_info["ratio_quartiles"] = {name: [round(x, 3) for x in q] for name, q in quartiles.items()}
    benchmark.extra_info["again"] = round(timings.speedup(first, again).median, 3)
    if goals:
        benchmark.extra_info["goals"] = goals
    benchmark.pedantic(run, rounds=20, iterations=max(1, int(1000 / medians[first])))
    print(f"\n{benchmark.name}: " + ", ".join(f"{k} {v}" for k, v in benchmark.extra_info.items()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("n", "width", "k"),
    [
        (1, 896, 1),
        (1, 2048, 1),
        (1, 4096, 1),
        (1, 2048, 4),
        (8, 2048, 1),
        (64, 2048, 1),
        (64, 2048, 4),
        (2048, 2048, 1),
    ],
)
def test_against_eager_hook_and_norm(benchmark: Any, n: int, width: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    h, weight = torch.randn(n, width).to(dtype), torch.rand(width).to(dtype)
    tables, slot = ablation(k, width), torch.zeros(n, dtype=torch.int32)
    fused, stock, bare = Fused(weight, tables, slot), RMSNorm(weight), RMSNorm(weight)
    rows = tables.bank.to(dtype)
    stock.register_forward_pre_hook(lambda module, args: (args[0] - (args[0] @ rows.T) @ rows,))
    gate(h, fused, tables, slot, weight)
    sides = {"fused": lambda: fused(h), "hook and norm": lambda: stock(h), "unsteered norm": lambda: bare(h)}
    goals = {"speedup": ">= 8"} if n == 1 and dtype == torch.bfloat16 else None
    ratios = {"speedup": ("hook and norm", "fused"), "over_unsteered": ("unsteered norm", "fused")}
    record(benchmark, sides["fused"], sides, goals, **ratios)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("n", [1, 64, 2048])
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_against_compile(benchmark: Any, n: int, dtype: torch.dtype) -> None:
    """The same edit and norm as one graph of torch.compile, which knows every shape and returns new tensors."""
    torch.manual_seed(1)
    width = 2048
    h, weight = torch.randn(n, width).to(dtype), torch.rand(width).to(dtype)
    tables, slot = ablation(1, width), torch.zeros(n, dtype=torch.int32)
    fused, norm, rows = Fused(weight, tables, slot), RMSNorm(weight), tables.bank.to(dtype)

    def edit_and_norm(h: Tensor) -> tuple[Tensor, Tensor]:
        h = h - (h @ rows.T) @ rows
        return h, norm(h)

    compiled = torch.compile(edit_and_norm, fullgraph=True, dynamic=False)
    gate(h, fused, tables, slot, weight)
    close(compiled(h), h, tables, slot, weight)
    sides = {"fused": lambda: fused(h), "compiled": lambda: compiled(h), "eager": lambda: edit_and_norm(h)}
    record(benchmark, sides["fused"], sides, speedup=("compiled", "fused"), eager_over_compiled=("eager", "compiled"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [896, 2048, 4096])
def test_bandwidth(benchmark: Any, width: int, dtype: torch.dtype) -> None:
    """Against a copy that moves the same bytes: the op reads h, writes h and writes y."""
    torch.manual_seed(1)
    n = 2048
    h, weight = torch.randn(n, width).to(dtype), torch.rand(width).to(dtype)
    tables, slot = ablation(1, width), torch.zeros(n, dtype=torch.int32)
    fused = Fused(weight, tables, slot)
    gate(h[:64].clone(), Fused(weight, tables, slot[:64]), tables, slot[:64], weight)
    y, source = torch.empty_like(h), torch.randn(n * width * 3 // 2).to(dtype)
    target, pointers = torch.empty_like(source), (slot.data_ptr(), weight.data_ptr(), 0, y.data_ptr(), 1)
    sides: dict[str, Callable[[], Any]] = {
        "fused": lambda: fused.kernel(n, h.data_ptr(), width, *pointers),
        "copy": lambda: target.copy_(source),
    }
    record(benchmark, sides["fused"], sides, {"of_copy": ">= 0.85"}, of_copy=("copy", "fused"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("n", [1, 64, 2048])
@pytest.mark.parametrize("residual", [True, False], ids=["add and norm", "norm"])
def test_cost_of_steering_over_our_unsteered(benchmark: Any, residual: bool, n: int, dtype: torch.dtype) -> None:
    """The same call with 0, 1, 4 and 16 directions; goals for the residual sum with the norm after it."""
    torch.manual_seed(1)
    width = 2048
    h, weight, slot = torch.randn(n, width).to(dtype), torch.rand(width).to(dtype), torch.zeros(n, dtype=torch.int32)
    delta = torch.randn(n, width).to(dtype)
    sides: dict[str, Callable[[], Any]] = {}
    for k in (0, 1, 4, 16):
        tables = ablation(max(k, 1), width)
        fused = Fused(weight, tables, slot if k else None)
        gate(h.clone(), fused, tables, slot if k else None, weight)
        edited = h + delta
        y = fused(edited)
        assert all(map(torch.equal, fused.add(h, delta), (edited, y)))
        sides[f"k{k}"] = (lambda fused=fused: fused.add(h, delta)) if residual else (lambda fused=fused: fused(h))
    goals = {"k1": "<= 1.05", "k16": "<= 1.3"} if residual else None
    record(benchmark, sides["k1"], sides, goals, k1=("k1", "k0"), k4=("k4", "k0"), k16=("k16", "k0"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_one_plan_or_256_in_a_batch(benchmark: Any, dtype: torch.dtype) -> None:
    """256 rows, each with the same plan or each with its own; the bank of 256 plans is 256 times larger."""
    torch.manual_seed(1)
    n, width = 256, 2048
    h, weight, tables = torch.randn(n, width).to(dtype), torch.rand(width).to(dtype), ablation(1, width, plans=n)
    same, own = torch.zeros(n, dtype=torch.int32), torch.randperm(n).to(torch.int32)
    one, many = Fused(weight, tables, same), Fused(weight, tables, own)
    gate(h, one, tables, same, weight)
    gate(h, many, tables, own, weight)
    sides = {"one plan": lambda: one(h), "256 plans": lambda: many(h)}
    ratio = ("256 plans", "one plan")
    record(benchmark, sides["256 plans"], sides, {"flatness": "<= 1.05"}, flatness=ratio)


def test_cost_of_a_call(benchmark: Any) -> None:
    """The bound kernel on no rows: what calling it costs."""
    kernel = cpu.bind(None, 2048, torch.bfloat16, Norm.LLAMA, EPS)
    h = torch.empty(1, 2048, dtype=torch.bfloat16)
    pointer = h.data_ptr()
    sides: dict[str, Callable[[], Any]] = {
        "kernel": lambda: kernel(0, pointer, 2048, 0, 0, 0, pointer, 1),
        "kernel and addresses": lambda: kernel(0, h.data_ptr(), 2048, 0, 0, 0, h.data_ptr(), 1),
        "torch.empty_like": lambda: torch.empty_like(h),
    }
    record(benchmark, sides["kernel"], sides)
