"""The block wrapper that repeng wrote and dialz took over: both are driven by the same two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .adapter import Kind, Rows, directions, kind_of, layers_of, strength_of

KINDS: tuple[Kind, ...] = ("add", "ablate", "clamp")


def set_control(wrapped: Any, rows: Rows) -> None:
    """Vectors ``[1 or B, 1, H]`` with an operator; one for each row of a batch goes through the same door.

    ``set_raw_control`` hands the operator the state ``[B, T, H]`` and the control, zero at padding.
    """
    kind, strength = kind_of(rows), strength_of(rows)
    scale = strength if kind == "add" else 1.0
    control = {layer: scale * directions(rows, layer) for layer in layers_of(rows)}
    if kind == "add":
        wrapped.set_raw_control(control)
    else:
        wrapped.set_raw_control(control, operator=_pin(strength if kind == "clamp" else 0.0))


def _pin(target: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda h, v: h + (target - (h * v).sum(-1, keepdim=True)) * v
