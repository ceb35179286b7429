"""How cost grows: of the fused op with rows, width, directions and plans; of a decode step with layers and context.

``OMP_NUM_THREADS=1 pytest benchmarks/test_scaling.py --benchmark-json=benchmarks/results/scaling.json``. Every size of
every side runs in turn; a straight line is fitted to the medians, each weighed by one over itself, so that ``base`` and
``slope`` are as right for small sizes as for large ones and ``off`` is the worst relative distance from the line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import steerkern as sk
from benchmarks import effort
from benchmarks.norms import Fused, RMSNorm, ablation, gate
from benchmarks.shapes import SHAPES, random_llama
from benchmarks.sides import warmed
from steerkern.ops import cpu
from steerkern.timing import Contender, ablation_hooks, interleave

pytestmark = pytest.mark.skipif(bool(cpu.unusable()), reason=cpu.unusable() or "-")
Run = Callable[[], Any]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
WIDTH = 2048
STEPS = 4
GROUP = 200e-6
"""Shorter calls are timed in groups of about so many seconds."""


@DTYPES
def test_rows(benchmark: Any, dtype: torch.dtype) -> None:
    sizes = (1, 4, 16, 64, 256, 1024)
    curve(benchmark, f"rows (width {WIDTH}, K=1)", sizes, op_sides(dtype, lambda n: (n, WIDTH, 1)))


@DTYPES
def test_width(benchmark: Any, dtype: torch.dtype) -> None:
    sizes = (256, 512, 1024, 2048, 4096, 8192)
    curve(benchmark, "width (16 rows, K=1)", sizes, op_sides(dtype, lambda width: (16, width, 1)))


@DTYPES
def test_directions(benchmark: Any, dtype: torch.dtype) -> None:
    sizes = (1, 2, 4, 8, 16, 32, 64)
    curve(benchmark, f"directions K (16 rows, width {WIDTH})", sizes, op_sides(dtype, lambda k: (16, WIDTH, k)))


@DTYPES
def test_plans(benchmark: Any, dtype: torch.dtype) -> None:
    """256 rows; the plans are dealt out to them at random, and all of 256 are held."""
    rows, tables = 256, ablation(1, WIDTH, plans=256)

    def fused(plans: int) -> Contender:
        h, weight = rows_of(rows, WIDTH, dtype)
        slot = (torch.randperm(rows) % plans).to(torch.int32)
        op = Fused(weight, tables, slot)
        gate(h, op, tables, slot, weight)
        return Contender("", lambda: op(h))

    curve(benchmark, f"plans in a batch of {rows} (width {WIDTH}, K=1)", (1, 4, 16, 64, 256), {"fused": fused})


def test_layers(benchmark: Any) -> None:
    """A decode step of a model of width 256, every layer steered."""
    shape = SHAPES["9M"] | {"vocab_size": 512}
    unit = torch.nn.functional.normalize(torch.randn(256, generator=torch.Generator().manual_seed(1)), dim=0)
    plan = sk.Plan(sk.ablate(unit), name="open")
    models = {}
    for layers in (2, 4, 8, 16, 32):
        torch.manual_seed(0)
        config = LlamaConfig(**{**shape, "num_hidden_layers": layers}, pad_token_id=0, bos_token_id=1)
        models[layers] = LlamaForCausalLM(config).eval()

    sides = decode_sides(lambda layers: steps(models[layers], 16), models.__getitem__, plan, unit)
    curve(benchmark, "layers (decode step, width 256, fp32)", tuple(models), sides, rounds=20, units=STEPS)


def test_context(benchmark: Any) -> None:
    """A decode step of the 9M model behind more and more tokens."""
    model = random_llama("9M")
    unit = torch.nn.functional.normalize(torch.randn(256, generator=torch.Generator().manual_seed(1)), dim=0)
    plan = sk.Plan(sk.ablate(unit), name="open")
    sides = decode_sides(lambda context: steps(model, context), lambda _: model, plan, unit)
    curve(benchmark, "tokens of context (decode step, 9M, fp32)", (16, 512, 1024, 2048), sides, rounds=20, units=STEPS)


@DTYPES
@pytest.mark.parametrize("n", [8, WIDTH])
def test_roofline(benchmark: Any, n: int, dtype: torch.dtype) -> None:
    """Work and traffic of the op, beside a copy of as many bytes and a matrix product, all in turn.

    A row of width H and K directions is 4 H K operations to edit and 4 H to normalise. It is read once and written once
    normalised, and if it is edited once more; directions and weight are read once per call.
    """
    torch.manual_seed(1)
    points: list[dict[str, float]] = []
    runs: dict[str, Run] = {}
    for k in (0, 1, 4, 16, 64):
        sides = op_sides(dtype, lambda n, k=k: (n, WIDTH, k))
        runs[f"K={k}"] = sides["fused"](n).run
        traffic = ((3 if k else 2) * n + 1) * WIDTH * dtype.itemsize + 4 * k * WIDTH
        points.append({"k": k, "bytes": traffic, "operations": 4 * n * WIDTH * (k + 1)})
    source = torch.randn(3 * n * WIDTH // 2).to(dtype)
    target, square = torch.empty_like(source), torch.randn(512, 512)
    runs |= {"copy": lambda: target.copy_(source), "product": lambda: square @ square}
    groups = {name: Group.of(run) for name, run in runs.items()}
    groups["copy again"] = groups["copy"]
    timings = interleave([Contender(*pair) for pair in groups.items()], rounds=effort.rounds(40))
    seconds = {name: timings.time(name).median / group.repeats for name, group in groups.items()}
    for point in points:
        point["seconds"] = seconds[f"K={point['k']}"]
    benchmark.extra_info |= {
        "rows": n,
        "points": points,
        "copy_bytes_per_second": 2 * source.nbytes / seconds["copy"],
        "product_operations_per_second": 2 * 512**3 / seconds["product"],
        "again": round(timings.speedup("copy again", "copy").median, 3),
    }
    benchmark.pedantic(runs["K=1"], rounds=5)


def rows_of(n: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows ``[n, width]`` of a residual stream and the weight of a norm."""
    torch.manual_seed(1)
    return torch.randn(n, width).to(dtype), torch.rand(width).to(dtype)


def op_sides(dtype: torch.dtype, shape: Callable[[int], tuple[int, int, int]]) -> dict[str, Callable[[int], Contender]]:
    """The op, and a hook with an eager norm, for ``shape(size)`` = rows, width and directions."""

    def fused(size: int) -> Contender:
        n, width, k = shape(size)
        h, weight = rows_of(n, width, dtype)
        tables, slot = ablation(max(k, 1), width), torch.zeros(n, dtype=torch.int32) if k else None
        op = Fused(weight, tables if k else None, slot)
        few = None if slot is None else slot[:64]
        gate(h[:64].clone(), Fused(weight, tables if k else None, few), tables, few, weight)
        return Contender("", lambda: op(h))

    def eager(size: int) -> Contender:
        n, width, k = shape(size)
        h, weight = rows_of(n, width, dtype)
        bank, norm = ablation(k, width).bank.to(dtype), RMSNorm(weight)
        return Contender("", lambda: norm(h - (h @ bank.T) @ bank))

    return {"fused": fused, "hook and norm": eager}


def steps(model: LlamaForCausalLM, context: int) -> Run:
    """:data:`STEPS` forwards of one token behind ``context`` tokens, which leave the cache as it was."""
    cache, ids = DynamicCache(config=model.config), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        model(torch.zeros(1, context, dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-STEPS)

    return run


def decode_sides(
    run: Callable[[int], Run], model: Callable[[int], LlamaForCausalLM], plan: sk.Plan, unit: Tensor
) -> dict[str, Callable[[int], Contender]]:
    """Stock, hook and session, as contenders that set up before the clock starts."""
    return {
        "stock": lambda size: Contender("", run(size)),
        "hook": lambda size: Contender("", run(size), lambda: ablation_hooks(model(size), unit)),
        "steerkern": lambda size: Contender(
            "", run(size), lambda: warmed(model(size), lambda: sk.steer(model(size), plan))
        ),
    }


@dataclass(frozen=True)
class Group:
    """Runs of one thing, so many in a row that a clock can tell."""

    run: Run
    repeats: int

    def __call__(self) -> None:
        for _ in range(self.repeats):
            self.run()

    @staticmethod
    def of(run: Run) -> Group:
        """As many runs as take about :data:`GROUP` seconds, at least one."""
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return Group(run, max(1, int(GROUP / min(taken))))


def curve(
    benchmark: Any,
    against: str,
    sizes: Sequence[int],
    sides: Mapping[str, Callable[[int], Contender]],
    rounds: int = 120,
    units: int = 1,
) -> None:
    """Time every side at every size in turn, and the first side once more at the smallest; fit straight lines.

    One run of a side is ``units`` of what is counted.
    """
    made = {(name, size): side(size) for name, side in sides.items() for size in sizes}
    made["again", sizes[0]] = made[next(iter(sides)), sizes[0]]
    groups = {key: Group.of(contender.run) for key, contender in made.items()}
    groups["again", sizes[0]] = groups[next(iter(sides)), sizes[0]]
    contenders = [Contender(f"{name} {size}", groups[name, size], made[name, size].setting) for name, size in made]
    timings = interleave(contenders, rounds=effort.rounds(rounds), warmup=1)
    first = f"{next(iter(sides))} {sizes[0]}"
    found = {}
    for name in sides:
        repeats = [groups[name, size].repeats for size in sizes]
        times = [timings.time(f"{name} {size}") for size in sizes]
        us = [[round(1e6 * t / n / units, 3) for t in quartiles] for quartiles, n in zip(times, repeats, strict=True)]
        found[name] = {"us": us, **line(sizes, [median for _, median, _ in us])}
    benchmark.extra_info |= {
        "against": against,
        "sizes": list(sizes),
        "sides": found,
        "again": round(timings.speedup(f"again {sizes[0]}", first).median, 3),
    }
    benchmark.pedantic(groups[next(iter(sides)), sizes[-1]], rounds=3)
    print(f"\n{against}: " + "; ".join(f"{n} {s['base_us']} + {s['slope_us']} x" for n, s in found.items()))


def line(x: Sequence[int], y: Sequence[float]) -> dict[str, float]:
    """The straight line nearest to ``y`` by relative distance, and the largest such distance."""
    slope, base = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    off = max(abs(base + slope * a - b) / b for a, b in zip(x, y, strict=True))
    return {"base_us": float(f"{base:.4g}"), "slope_us": float(f"{slope:.4g}"), "off": round(float(off), 3)}
