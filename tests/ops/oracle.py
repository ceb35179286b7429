"""The meaning of the ops in float64, as a loop over rows and entries that shares no code with the package."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerkern.ops.schemas import Norm, Tables

READ, WRITE, PAIR, COSINE, GAINED = 1, 2, 4, 8, 16


class Exact(NamedTuple):
    """Rows after the edit, unrounded, and the coordinates (NaN where none is read)."""

    h: Tensor
    coordinates: list[list[float]]


def edit(h: Tensor, slot: Tensor, tables: Tables) -> Exact:
    """``h [N, H]`` edited row by row in float64."""
    bank, links, fields, span, gain = (table.double().numpy() for table in tables)
    out, coordinates = [], []
    for row, s in zip(h.double().numpy(), slot.tolist(), strict=True):
        first, count, mode = span[s].astype(int) if s >= 0 else (0, 0, 0)
        entries = [(links[:, e].astype(int), fields[:, e]) for e in range(first, first + count)]
        a = [float(bank[link[0]] @ row) if link[3] & READ else 0.0 for link, _ in entries]
        norm = math.sqrt(float(row @ row))
        step, moved = np.zeros_like(row), False
        for k, ((v, mate, gate, flags), (alpha, beta, lo, hi, scale, gate_lo, gate_hi)) in enumerate(entries):
            if not flags & WRITE:
                continue
            if gate >= 0:
                condition = (a[gate] / norm if norm > 0 else 0.0) if flags & COSINE else a[gate]
                if not gate_lo <= condition <= gate_hi:
                    continue
            if flags & PAIR:
                target = alpha * math.hypot(a[k], a[mate])
            else:
                target = min(max((1 - beta) * a[k] + alpha, lo), hi)
            c = (gain[s] if flags & GAINED else 1.0) * scale * (target - a[k])
            moved |= c != 0
            step += c * bank[v]
        edited = row + step
        after = math.sqrt(float(edited @ edited))
        if mode & 1 and moved and after > 0:
            edited = edited * (norm / after)
        out.append(edited if moved else row)
        coordinates.append([x if link[3] & READ else math.nan for x, (link, _) in zip(a, entries, strict=True)])
    return Exact(torch.from_numpy(np.array(out).reshape(h.shape)), coordinates)


def normalise(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: int) -> Tensor:
    """``h [N, H]`` normalised in float64, without the roundings in between that a convention may have."""
    x = h.double()
    w = torch.ones(x.shape[-1], dtype=torch.float64) if weight is None else weight.double()
    if norm == Norm.LAYER:
        x = x - x.mean(-1, keepdim=True)
    unit = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if norm == Norm.GEMMA and weight is not None:
        w = w + 1
    return unit * w + (0.0 if bias is None else bias.double())


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of ``dtype`` at each magnitude."""
    info = torch.finfo(dtype)
    return torch.exp2(magnitude.double().clamp(min=info.smallest_normal).log2().floor()) * info.eps


def assert_close(
    got: Tensor, own: Tensor, exact: Tensor, dtype: torch.dtype, arrived: Tensor | None = None, ulps: int = 1
) -> None:
    """Largest error of each row against ``exact``: at most twice that of torch (``own``) plus ``ulps`` of ``dtype``.

    Twice, because another order of summation has another error of the same size; the ulp, because a value may lie at a
    rounding boundary. Where a projection of the rows ``arrived`` is part of the result, its terms may cancel: one
    float32 ulp of their norm is added.
    """
    if exact.numel() == 0:
        assert got.shape == exact.shape
        return
    error = (got.double() - exact).abs().amax(-1)
    limit = 2 * (own.double() - exact).abs().amax(-1) + ulps * ulp(exact.abs().amax(-1), dtype)
    if arrived is not None:
        limit += ulp(arrived.double().norm(dim=-1), torch.float32)
    worst = int((error - limit).argmax())
    assert bool((error <= limit).all()), f"row {worst}: error {error[worst]:.3g} above {limit[worst]:.3g}"
