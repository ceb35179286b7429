"""Programs for tests: every kind of edit, written as entries and packed into tables by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerkern.ops.schemas import Field, Flag, Link, Tables

INF = math.inf


@dataclass
class Entry:
    vector: Tensor
    alpha: float = 0.0
    beta: float = 0.0
    lo: float = -INF
    hi: float = INF
    scale: float = 1.0
    gate: int = -1
    gate_lo: float = -INF
    gate_hi: float = INF
    mate: int = -1
    flags: int = Flag.READ | Flag.WRITE


def pack(
    slots: Sequence[Sequence[Entry]], modes: Sequence[int] | None = None, gain: Sequence[float] | None = None
) -> Tables:
    """Tables whose bank rows are in reverse order of the entries, so that no index equals another by chance."""
    entries = [entry for slot in slots for entry in slot]
    count = len(entries)
    links = torch.empty(len(Link), count, dtype=torch.int32)
    fields = torch.empty(len(Field), count)
    for e, entry in enumerate(entries):
        links[:, e] = torch.tensor([count - 1 - e, entry.mate, entry.gate, int(entry.flags)])
        fields[:, e] = torch.tensor(
            [entry.alpha, entry.beta, entry.lo, entry.hi, entry.scale, entry.gate_lo, entry.gate_hi]
        )
    span, first = [], 0
    for s, slot in enumerate(slots):
        span.append([first, len(slot), int(modes[s]) if modes else 0])
        first += len(slot)
    return Tables(
        torch.stack([entry.vector for entry in reversed(entries)]).float().contiguous(),
        links,
        fields,
        torch.tensor(span, dtype=torch.int32),
        torch.tensor(gain if gain is not None else [1.0] * len(slots)),
    )


def units(count: int, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1))


def orthonormal(count: int, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64))
    return list(q.T.float())


def _rotation(vectors: list[Tensor]) -> list[Entry]:
    entries = []
    for k in range(0, len(vectors) - 1, 2):
        angle = 0.3 + k
        pair = Flag.READ | Flag.WRITE | Flag.PAIR
        entries += [
            Entry(vectors[k], alpha=math.cos(angle), mate=k + 1, flags=pair),
            Entry(vectors[k + 1], alpha=math.sin(angle), mate=k, flags=pair),
        ]
    return entries or [Entry(vectors[0], alpha=1.0)]


def _gated(vectors: list[Tensor], cosine: bool) -> list[Entry]:
    low = 0.02 if cosine else 0.3
    flags = Flag.WRITE | Flag.READ | (Flag.COSINE if cosine else 0)
    act = [Entry(v, beta=1.0, gate=len(vectors) - 1, gate_lo=low, flags=flags) for v in vectors[:-1]]
    return [*act, Entry(vectors[-1], flags=Flag.READ)]


def _mixed(vectors: list[Tensor]) -> list[Entry]:
    v = [*vectors, *units(8, vectors[0].numel(), 77)]
    pair = Flag.READ | Flag.WRITE | Flag.PAIR
    return [
        Entry(v[0], alpha=1.5, flags=Flag.WRITE),
        Entry(v[1], beta=1.0),
        Entry(v[2], lo=-0.2, hi=0.3),
        Entry(v[3], alpha=math.cos(1.1), mate=4, flags=pair),
        Entry(v[4], alpha=math.sin(1.1), mate=3, flags=pair),
        Entry(v[5], flags=Flag.READ),
        Entry(v[6], alpha=-0.7, beta=0.4, gate=5, gate_lo=-0.1, flags=Flag.READ | Flag.WRITE | Flag.GAINED),
        Entry(v[7], alpha=2.0, beta=1.0, scale=0.5, gate=5, gate_hi=0.0, flags=Flag.READ | Flag.WRITE | Flag.COSINE),
    ]


KINDS: dict[str, Callable[[list[Tensor]], list[Entry]]] = {
    "add": lambda vs: [Entry(v, alpha=1.5 - k, flags=Flag.WRITE) for k, v in enumerate(vs)],
    "ablate": lambda vs: [Entry(v, beta=1.0) for v in vs],
    "target": lambda vs: [Entry(v, alpha=0.7, beta=1.0) for v in vs],
    "cap": lambda vs: [Entry(v, hi=0.1) for v in vs],
    "floor": lambda vs: [Entry(v, lo=0.1) for v in vs],
    "partial": lambda vs: [Entry(v, beta=0.35) for v in vs],
    "rotate": _rotation,
    "gate_coordinate": lambda vs: _gated(vs, cosine=False),
    "gate_cosine": lambda vs: _gated(vs, cosine=True),
    "gain": lambda vs: [Entry(v, alpha=0.4, beta=0.9, flags=Flag.READ | Flag.WRITE | Flag.GAINED) for v in vs],
    "scale": lambda vs: [Entry(v, alpha=2.0, scale=-0.6, flags=Flag.WRITE) for v in vs],
    "keep_norm": lambda vs: [Entry(v, alpha=3.0, flags=Flag.WRITE) for v in vs],
    "probe": lambda vs: [Entry(v, flags=Flag.READ) for v in vs],
    "mixed": _mixed,
}


def program(kind: str, width: int) -> Tables:
    """Five slots: the kind with 1, 3 and 17 entries, none, and additions, so that slots of different lengths mix."""
    make = KINDS[kind]
    slots = [make(units(count, width, count)) for count in (1, 3, 17)]
    slots += [[], KINDS["add"](units(2, width, 5))]
    keep = 1 if kind == "keep_norm" else 0
    return pack(slots, modes=[keep, keep, keep, 0, 0], gain=[0.5, -1.25, 1.0, 1.0, 2.0])
