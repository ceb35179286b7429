"""One launch of the op: the ways of launching the CUDA kernel against each other, and what a call costs the host."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from steerkern.ops import dispatch
from steerkern.ops.schemas import Norm

from .device import Device, Run, quartiles, ratio
from .ops import DTYPE, EPS, ablation, buffers, check, excess, fused, timed

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no dependent launch": {"dependent": False},
    "Gram": {"gram": True},
    "4 warps": {"warps": 4},
    "16 warps": {"warps": 16},
    "cluster of 2": {"cluster": 2},
    "cluster of 4": {"cluster": 4},
    "cluster of 8": {"cluster": 8},
}


def variants(device: Device, n: int, width: int, k: int) -> dict[str, Any]:
    """One shape of the CUDA backend, launched in every way there is."""
    backend = device.backends[0]
    weight = (torch.rand(width, device=device.name) + 0.5).to(DTYPE)
    sets, tables = buffers(device, n, width), ablation(k, width, 1, device)
    slot = torch.zeros(n, dtype=torch.int32, device=device.name)
    ways = {"default": {}, "default again": {}} if device.dry else {**VARIANTS, "default again": {}}
    sides = {name: fused(device, backend, tables, slot, weight, **way) for name, way in ways.items()}
    wrong = excess({name: check(side, tables, slot, weight, sets[0]) for name, side in sides.items()})
    found: dict[str, Any] = {"backend": backend, "n": n, "width": width, "k": k, "wrong": wrong}
    if "default" in wrong:
        return found
    sides = {name: side for name, side in sides.items() if name not in wrong}
    sides["unsteered"] = fused(device, backend, tables, None, weight)
    if not device.dry:
        sides["unsteered, no dependent launch"] = fused(device, backend, tables, None, weight, dependent=False)
    seconds = timed(device, sides, sets, 3 if device.dry else 15)
    return {
        **found,
        "us": {name: [1e6 * s for s in quartiles(values, 9)] for name, values in seconds.items()},
        "over_default": {name: ratio(values, seconds["default"]) for name, values in seconds.items()},
    }


def variant_grid(device: Device) -> list[tuple[int, int, int]]:
    if device.dry:
        return [(2, 64, 1)]
    return [(n, width, k) for width in (4096, 2048, 8192) for n in (1, 2048, 64, 8) for k in (1, 16)]


def calls(device: Device) -> dict[str, float]:
    """Host microseconds of one call at N=1, nobody waiting for the device in between."""
    width = 64 if device.dry else 4096
    weight = torch.ones(width, device=device.name, dtype=DTYPE)
    b = buffers(device, 1, width)[0]
    tables, slot = ablation(1, width, 1, device), torch.zeros(1, dtype=torch.int32, device=device.name)
    op = torch.ops.steerkern.steer_norm_
    sides: dict[str, Run] = {
        "F.rms_norm": lambda: F.rms_norm(b.h, (width,), weight, EPS),
        "registered op": lambda: op(b.h, slot, *tables, weight, None, EPS, int(Norm.LLAMA), b.delta),
    }
    for backend in device.backends:
        if not dispatch.backends()[backend]:
            side = fused(device, backend, tables, slot, weight)
            sides[backend] = lambda side=side: side(b)  # type: ignore[misc]
    repeats = 20 if device.dry else 200
    host = Device()  # its clock
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(9):
        for name, run in sides.items():
            device.synchronize()
            taken[name].append(host.timed(lambda run=run: [run() for _ in range(repeats)]) / repeats)  # type: ignore[misc]
    return {name: round(1e6 * quartiles(values, 9)[1], 3) for name, values in taken.items()}
