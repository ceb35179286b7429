"""Numbers and vectors as edits take them: checked, stacked, made unit or orthonormal."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

from .directions import Direction, check_vector
from .ops.schemas import MAX_ENTRIES

Vector = Union[Tensor, Direction]

UNIT_TOLERANCE = 1e-5
"""A unit row rounded to float32 is off by less than 1e-6; this only finds rows that were never unit."""


def finite(value: object, what: str, *, nonzero: bool = False) -> float:
    """Return a number as float if float32, the dtype of the tables, holds it (and, if asked, not as 0).

    Raises:
        TypeError: not a number.
        ValueError: NaN, Inf, beyond float32, or zero.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError  # float would parse it
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} must be a number, got {reprlib.repr(value)}") from None
    held = float(torch.tensor(number, dtype=torch.float32))
    if not math.isfinite(held) or (nonzero and held == 0.0):
        raise ValueError(f"{what} must be finite{' and not 0' if nonzero else ''} in float32, got {number}")
    return number


def interval(lo: object, hi: object, what: str) -> tuple[float, float]:
    """``[lo, hi]``, open below (-inf) or above (inf) but not both; else ValueError."""
    low = -math.inf if lo == -math.inf else finite(lo, f"lo of {what}")
    high = math.inf if hi == math.inf else finite(hi, f"hi of {what}")
    if low > high:
        raise ValueError(f"{what} needs lo <= hi, got [{low}, {high}]")
    if (low, high) == (-math.inf, math.inf):
        raise ValueError(f"{what} needs lo or hi: the interval [-inf, inf] bounds nothing")
    return low, high


def stack_of(vectors: Sequence[Vector], what: str) -> Tensor:
    """``[k, H]`` float32, each vector checked; TypeError or ValueError names the first that is not one."""
    if not 1 <= len(vectors) <= MAX_ENTRIES:
        raise ValueError(f"{what}s must be 1 to {MAX_ENTRIES}, got {len(vectors)}")
    checked = [v.raw if isinstance(v, Direction) else check_vector(v, what) for v in vectors]
    widths = {v.numel() for v in checked}
    if len(widths) > 1:
        raise ValueError(f"{what}s must have one width, got {sorted(widths)}")
    return torch.stack(checked)


def unit_rows(stack: Tensor) -> Tensor:
    """Rows of norm 1, in fp64."""
    wide = stack.double()
    norms: Tensor = wide.norm(dim=1, keepdim=True)
    return wide / norms


def orthonormal(stack: Tensor, where: str) -> Tensor:
    """Gram-Schmidt in fp64, twice, keeping the order; dependent vectors raise."""
    basis: list[Tensor] = []
    for i, vector in enumerate(unit_rows(stack)):
        rest = vector
        for _ in range(2):
            for b in basis:
                rest = rest - torch.dot(rest, b) * b
        norm = float(rest.norm())
        if norm < UNIT_TOLERANCE:
            raise ValueError(f"{where}: vector {i} lies in the span of the ones before it")
        basis.append(rest / norm)
    return torch.stack(basis)


def check_unit(stack: Tensor, what: str) -> None:
    """Raise ValueError unless every row has norm 1."""
    norms = stack.double().norm(dim=1)
    if bool((norms - 1).abs().max() > UNIT_TOLERANCE):
        raise ValueError(f"{what} must have norm 1, got {norms.tolist()}")
