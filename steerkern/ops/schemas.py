"""The contract of the two ops: table layout, schemas, argument checks and fake kernels.

Shapes by name: ``N`` rows, ``H`` width, ``R`` bank rows, ``E`` entries, ``S`` slots, ``T`` trace columns.
Every backend implements exactly what ``reference.py`` computes; this file says what may be passed to it.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ENTRIES = 64
"""Entries that one slot may hold; kernels keep the coordinates of a row in a fixed array of this size."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Link(IntEnum):
    """Rows of ``links [4, E] int32``."""

    ROW = 0
    """Bank row of the entry's direction."""
    MATE = 1
    """Index within the slot of the other axis of a rotation, or -1."""
    GATE = 2
    """Index within the slot of the entry whose coordinate opens this one, or -1."""
    FLAGS = 3


class Field(IntEnum):
    """Rows of ``fields [7, E] float32``."""

    ALPHA = 0
    BETA = 1
    LO = 2
    HI = 3
    SCALE = 4
    GATE_LO = 5
    GATE_HI = 6


class Flag(IntFlag):
    """Bits of ``links[Link.FLAGS]``."""

    READ = 1
    """The coordinate is needed; without it the projection is skipped (a plain add)."""
    WRITE = 2
    """The entry edits the row; without it the entry only reads (probe, gate condition)."""
    PAIR = 4
    """One axis of a rotation: the coordinate becomes ``alpha * |(a, a_mate)|``."""
    COSINE = 8
    """The gate compares the cosine of the row with the condition direction, not the coordinate."""
    GAINED = 16
    """The entry is multiplied by ``gain[slot]`` of the site."""


class Mode(IntFlag):
    """Bits of ``span[:, 2]``."""

    KEEP_NORM = 1
    """The edited row is rescaled to the norm with which it arrived."""


class Norm(IntEnum):
    """Normalisation after the edit, on the edited row rounded to its dtype; sums in fp32."""

    NONE = 0
    LLAMA = 1
    """``w * round(h * rsqrt(mean(h^2) + eps))``, the product in the row's dtype."""
    FP32 = 2
    """``round(w * h * rsqrt(mean(h^2) + eps))``."""
    GEMMA = 3
    """``round((1 + w) * h * rsqrt(mean(h^2) + eps))``."""
    LAYER = 4
    """LayerNorm: ``round(w * (h - mean) * rsqrt(var + eps) + b)``."""


class Tables(NamedTuple):
    """The device tables of one site, as a program packs them."""

    bank: Tensor
    """``[R, H]`` float32, unit rows."""
    links: Tensor
    """``[4, E]`` int32, see :class:`Link`."""
    fields: Tensor
    """``[7, E]`` float32, see :class:`Field`."""
    span: Tensor
    """``[S, 3]`` int32: first entry, number of entries, :class:`Mode`."""
    gain: Tensor
    """``[S]`` float32, written by a controller."""


_TABLES = "Tensor bank, Tensor links, Tensor fields, Tensor span, Tensor gain"
STEER_SCHEMA = f"steer_(Tensor(a!) h, Tensor slot, {_TABLES}, Tensor? delta=None, Tensor(b!)? trace=None) -> ()"
STEER_NORM_SCHEMA = (
    f"steer_norm_(Tensor(a!) h, Tensor? slot, {_TABLES}, Tensor? weight, Tensor? bias, float eps, int norm, "
    "Tensor? delta=None, Tensor(b!)? trace=None) -> Tensor"
)


def check(
    h: Tensor,
    slot: Tensor | None,
    tables: Tables,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: int,
    delta: Tensor | None,
    trace: Tensor | None,
) -> None:
    """Raise one sentence for the first argument that breaks the contract; reads shapes and dtypes only."""
    torch._check_value(h.dim() == 2, lambda: f"h must be [N, H], got {tuple(h.shape)}")
    n, width = h.shape
    torch._check_type(
        h.dtype in DTYPES or h.dtype == torch.float64,
        lambda: f"h must be float32, bfloat16 or float16 (float64 on the reference), got {h.dtype}",
    )
    torch._check_value(norm in Norm.__members__.values(), lambda: f"norm must be one of {[*Norm]}, got {norm}")
    if slot is not None:
        torch._check_type(slot.dtype == torch.int32, lambda: f"slot must be int32, got {slot.dtype}")
        torch._check_value(slot.shape == (n,), lambda: f"slot must be [{n}], one per row, got {tuple(slot.shape)}")
        check_tables(tables, width)
    if weight is not None:
        _check_table("weight", weight, h.dtype, (width,))
    if bias is not None:
        _check_table("bias", bias, h.dtype, (width,))
    torch._check_value(bias is None or norm == Norm.LAYER, lambda: f"bias is for LayerNorm only, got norm {norm}")
    if delta is not None:
        torch._check_value(delta.shape == h.shape, lambda: f"delta must be {tuple(h.shape)}, got {tuple(delta.shape)}")
        torch._check_type(delta.dtype == h.dtype, lambda: f"delta must be {h.dtype} like h, got {delta.dtype}")
    if trace is not None:
        torch._check_type(trace.dtype == torch.float32, lambda: f"trace must be float32, got {trace.dtype}")
        torch._check_value(
            trace.dim() == 2 and trace.shape[0] == n and trace.is_contiguous(),
            lambda: f"trace must be a contiguous [{n}, T], got {tuple(trace.shape)}",
        )


def check_tables(tables: Tables, width: int) -> None:
    """Raise one sentence for the first table of another dtype or shape than :class:`Tables` says."""
    bank, links, fields, span, gain = tables
    _check_table("bank", bank, torch.float32, (bank.shape[0], width))
    _check_table("links", links, torch.int32, (len(Link), links.shape[-1]))
    _check_table("fields", fields, torch.float32, (len(Field), links.shape[-1]))
    _check_table("span", span, torch.int32, (span.shape[0], 3))
    _check_table("gain", gain, torch.float32, (span.shape[0],))


def _check_table(name: str, table: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch._check_type(table.dtype == dtype, lambda: f"{name} must be {dtype}, got {table.dtype}")
    torch._check_value(
        tuple(table.shape) == shape and table.is_contiguous(),
        lambda: f"{name} must be a contiguous {list(shape)}, got {list(table.shape)} with strides {table.stride()}",
    )


def steer_fake(
    h: Tensor,
    slot: Tensor,
    bank: Tensor,
    links: Tensor,
    fields: Tensor,
    span: Tensor,
    gain: Tensor,
    delta: Tensor | None = None,
    trace: Tensor | None = None,
) -> None:
    """The shape rule of ``steer_``: nothing comes back."""
    check(h, slot, Tables(bank, links, fields, span, gain), None, None, Norm.NONE, delta, trace)


def steer_norm_fake(
    h: Tensor,
    slot: Tensor | None,
    bank: Tensor,
    links: Tensor,
    fields: Tensor,
    span: Tensor,
    gain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: int,
    delta: Tensor | None = None,
    trace: Tensor | None = None,
) -> Tensor:
    """The shape rule of ``steer_norm_``: a new contiguous ``[N, H]`` in the dtype of ``h``."""
    torch._check_value(norm != Norm.NONE, lambda: "steer_norm_ needs a norm; without one, steer_ edits the rows")
    check(h, slot, Tables(bank, links, fields, span, gain), weight, bias, norm, delta, trace)
    return h.new_empty(h.shape)
