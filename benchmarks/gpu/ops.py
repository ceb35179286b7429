"""The fused op on its own: against the unsteered kernel of the same backend, torch, hooks and torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import steerkern as sk
from steerkern.ops import dispatch, reference
from steerkern.ops.schemas import Flag, Norm, Tables
from steerkern.program import Program, Site

from . import goals
from .device import Device, Run, interleaved, quartiles, ratio

EPS = 1e-6
DTYPE = torch.bfloat16
LIMIT = 5e-3
"""Of a relative error; bf16 rounds by up to 2^-9."""


@dataclass
class Buffers:
    """One set of what a call reads and writes; calls go from set to set, so that none finds its rows in the L2."""

    h: Tensor
    delta: Tensor
    y: Tensor


def buffers(device: Device, n: int, width: int) -> list[Buffers]:
    """As many sets as overfill the L2 two and a half times, at most 256."""
    size = 3 * n * width * DTYPE.itemsize
    count = max(2, min(256, int(2.5 * device.cache_bytes) // size + 1)) if not device.dry else 2
    made = []
    for _ in range(count):
        h = torch.randn(n, width, device=device.name).to(DTYPE)
        # a small step: h grows by it in every call
        made.append(Buffers(h, (1e-3 * torch.randn_like(h)).to(DTYPE), torch.empty_like(h)))
    return made


def ablation(k: int, width: int, plans: int, device: Device) -> Tables:
    """``plans`` slots that ablate ``k`` orthonormal directions each, of their own."""
    torch.manual_seed(0)
    random = torch.randn(plans, width, k, device=device.name)
    bank = torch.linalg.qr(random)[0].transpose(1, 2).reshape(plans * k, width).contiguous()
    links = torch.full((4, plans * k), -1, dtype=torch.int32)
    links[0] = torch.arange(plans * k)
    links[3] = int(Flag.READ | Flag.WRITE)
    fields = torch.tensor([0.0, 1.0, -torch.inf, torch.inf, 1.0, -torch.inf, torch.inf])
    span = torch.tensor([[p * k, k, 0] for p in range(plans)], dtype=torch.int32)
    small = (links, fields[:, None].repeat(1, plans * k), span, torch.ones(plans))
    return Tables(bank, *(t.to(device.name) for t in small))


Side = Callable[[Buffers], Any]


def fused(device: Device, backend: str, tables: Tables, slot: Tensor | None, weight: Tensor, **tuning: Any) -> Side:
    """The op of a backend through its bound kernel; ``slot`` None: no row is steered."""
    if backend == "reference":
        run = dispatch.RUNNERS["reference"]

        def call(b: Buffers) -> None:
            y = run(b.h, slot, tables, weight, None, EPS, Norm.LLAMA, b.delta, None)
            assert y is not None
            b.y.copy_(y)

        return call
    kernel = importlib.import_module(f"steerkern.ops.{backend}").bind(tables, weight.numel(), DTYPE, Norm.LLAMA, EPS)
    if tuning:
        kernel.tune(**tuning)
    where = (0 if slot is None else slot.data_ptr(), weight.data_ptr(), 0)

    def launch(b: Buffers) -> None:
        n, width = b.h.shape
        kernel.full(
            n, b.h.data_ptr(), width, *where, b.y.data_ptr(), b.delta.data_ptr(), width, 0, 0, device.last_argument()
        )

    launch.keep = (slot, weight, tables)  # type: ignore[attr-defined]
    return launch


def torch_norm(weight: Tensor) -> Side:
    """Add and ``F.rms_norm``: two kernels."""

    def call(b: Buffers) -> None:
        b.h.add_(b.delta)
        b.y.copy_(F.rms_norm(b.h, (weight.numel(),), weight, EPS))

    return call


def hooked(weight: Tensor, directions: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What a hook and the norm of transformers do, operation by operation."""
    rows = directions.to(DTYPE)

    def call(h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        h = h + delta
        h = h - (h @ rows.T) @ rows
        wide = h.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return h, weight * unit.to(h.dtype)

    return call


def apart(call: Callable[[Tensor, Tensor], Any]) -> Side:
    return lambda b: call(b.h, b.delta)


def check(side: Side, tables: Tables, slot: Tensor, weight: Tensor, b: Buffers) -> float:
    """Relative error of a side against the reference, in the first and the last rows of the very call that is timed."""
    n = slot.numel()
    rows = torch.arange(n, device=slot.device)
    rows = rows if n <= 64 else torch.cat((rows[:32], rows[-32:]))
    mine = Buffers(b.h.clone(), b.delta, torch.full_like(b.h, torch.nan))
    edited, y = reference.steer(b.h[rows], slot[rows], tables, weight, None, EPS, Norm.LLAMA, b.delta[rows])
    side(mine)
    assert y is not None
    pairs = ((mine.h[rows], edited), (mine.y[rows], y))
    errors = [(found.float() - wanted.float()).norm() / wanted.float().norm() for found, wanted in pairs]
    return float(torch.stack(errors).max())  # of nan and a number: nan


def excess(errors: Mapping[str, float]) -> dict[str, str]:
    """The sides whose error is more than rounding."""
    return {name: f"relative error {error:.3g}" for name, error in errors.items() if not error < LIMIT}


def timed(device: Device, sides: dict[str, Side], sets: Sequence[Buffers], rounds: int) -> dict[str, list[float]]:
    """Seconds per call: each side captured as one graph of calls over all sets, replayed in turn."""
    calls = max(len(sets), 2 if device.dry else 16)

    def unit(side: Side) -> Run:
        def run() -> None:
            for i in range(calls):
                side(sets[i % len(sets)])

        return device.graph(run)

    graphs = {name: unit(side) for name, side in sides.items()}
    seconds = interleaved(device, graphs, rounds)
    return {name: [s / calls for s in values] for name, values in seconds.items()}


def replayed(device: Device) -> dict[str, Any]:
    """One captured launch, replayed after each change of its program and row map: has it the bits of a launch now?

    Every change gives other rows than the one before, so a graph that keeps its old tables is found out.
    """
    n, width = (6, 64) if device.dry else (64, 4096)
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(3))
    first, second = (sk.Plan(sk.add(v, 4.0), name=name) for v, name in zip(vectors, ("first", "second"), strict=True))
    weight = torch.ones(width, device=device.name, dtype=DTYPE)
    found: dict[str, dict[str, bool]] = {}
    for backend in device.backends:
        if dispatch.backends()[backend]:
            continue
        program = Program([Site(0, "resid_pre")], width, device.name)
        program.add(first)
        slot = torch.full((n,), -1, dtype=torch.int32, device=device.name)
        slot[: n // 2] = program.slot([("first", 0)])
        stock, b = buffers(device, n, width)[:2]
        side = fused(device, backend, program.tables(0), slot, weight)

        def run(b: Buffers = b, stock: Buffers = stock, side: Side = side) -> None:
            b.h.copy_(stock.h)
            side(b)

        def swap(program: Program = program, slot: Tensor = slot) -> None:
            program.remove("first")
            program.add(second)
            slot[: n // 2] = program.slot([("second", 0)])

        changes: dict[str, Run] = {
            "as captured": lambda: None,
            "strength": lambda program=program: program.set_scale("first", -2.0),
            "plan": swap,
            "rows": lambda slot=slot: slot.copy_(slot.flip(0)),
        }
        replay, before, found[backend] = device.graph(run), stock.h, {}
        for name, change in changes.items():
            change()
            replay()
            device.synchronize()
            captured = b.h.clone(), b.y.clone()
            run()
            device.synchronize()
            assert not torch.equal(b.h, before), f"{backend}: {name} changed nothing"
            before = b.h.clone()
            found[backend][name] = torch.equal(captured[0], b.h) and torch.equal(captured[1], b.y)
    stale = {backend: ", ".join(name for name, same in how.items() if not same) for backend, how in found.items()}
    wrong = {backend: f"a replay does not follow: {names}" for backend, names in stale.items() if names}
    return {"changes": found, "wrong": wrong}


def grid(device: Device) -> Iterator[tuple[int, int]]:
    """(N, H), what matters most first."""
    if device.dry:
        yield from ((1, 64), (8, 64))
        return
    for width in (4096, 2048, 8192):
        for n in (1, 2048, 64, 8, 8192, 32768, 256):
            yield n, width


def measure(
    device: Device, backend: str, n: int, width: int, copy_rate: float | None, compiled: bool = False
) -> dict[str, Any]:
    """One shape of one backend: every K, 1 against 256 plans, and what it replaces; only if all of it is right."""
    weight = (torch.rand(width, device=device.name) + 0.5).to(DTYPE)
    sets = buffers(device, n, width)
    slot = torch.zeros(n, dtype=torch.int32, device=device.name)
    plans = f"K=1, {min(n, 256)} plans"
    own = torch.arange(n, device=device.name, dtype=torch.int32) % 256
    cases = {f"K={k}": (ablation(k, width, 1, device), slot) for k in (1, 4, 16)}
    cases[plans] = (ablation(1, width, min(n, 256), device), own)
    one = cases["K=1"][0]
    sides = {"unsteered": fused(device, backend, one, None, weight)}
    sides |= {name: fused(device, backend, tables, rows, weight) for name, (tables, rows) in cases.items()}
    cases["unsteered"] = (one, torch.full_like(slot, -1))
    errors = {name: check(sides[name], *case, weight, sets[0]) for name, case in cases.items()}
    found: dict[str, Any] = {"backend": backend, "n": n, "width": width, "dtype": str(DTYPE), "sets": len(sets)}
    found |= {"relative_error": {name: round(e, 6) for name, e in errors.items()}, "wrong": excess(errors)}
    if found["wrong"]:
        return {**found, "goals": list(goals.of_op(n, backend, found))}
    if n < 8:
        del sides[plans]
    hook = hooked(weight, one.bank)
    sides |= {"add and F.rms_norm": torch_norm(weight), "hook K=1": apart(hook)}
    if compiled:
        sides["compiled hook K=1"] = apart(torch.compile(hook, dynamic=False))
    seconds = timed(device, sides, sets, 3 if device.dry else 15)
    moved = 4 * n * width * DTYPE.itemsize  # h and delta in, h and y out
    found |= {
        "us": {name: [1e6 * s for s in quartiles(values, 9)] for name, values in seconds.items()},
        "over_unsteered": {name: ratio(values, seconds["unsteered"]) for name, values in seconds.items()},
        "of_copy": {
            name: quartiles([moved / s / copy_rate for s in seconds[name]], 4) for name in ("unsteered", "K=1", "K=16")
        } if copy_rate else {},
        "plans_over_one": ratio(seconds[plans], seconds["K=1"]) if n >= 8 else None,
    }  # fmt: skip
    return {**found, "goals": list(goals.of_op(n, backend, found))}


def copy_rate(device: Device) -> dict[str, float]:
    """Bytes per second, read and written, of a large copy and of one the size of 2048 rows of 4096."""
    found = {}
    for name, size in (("large", 1 << 30), ("16 MiB", 1 << 24)) if not device.dry else (("large", 1 << 20),):
        count = max(1, min(16, int(2.5 * device.cache_bytes) // (2 * size) + 1))
        pairs = [(torch.ones(size, dtype=torch.uint8, device=device.name), None) for _ in range(count)]
        targets = [torch.empty_like(source) for source, _ in pairs]

        def run(pairs: Any = pairs, targets: Any = targets) -> None:
            for (source, _), target in zip(pairs, targets, strict=True):
                target.copy_(source)

        seconds = interleaved(device, {"copy": device.graph(run)}, 3 if device.dry else 15)["copy"]
        found[name] = 2.0 * size * count / quartiles(seconds, 9)[1]
    return found
