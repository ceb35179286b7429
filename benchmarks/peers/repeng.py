"""repeng: each block replaced by a wrapper that holds a control.

The newest release on PyPI names ``numpy.float_`` in annotations, which numpy 2 no longer has; the name is lent to it
while it is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .adapter import Adapter, Rows, Steered, generate, layers_of
from .control_module import KINDS, set_control


@contextlib.contextmanager
def numpy_of_old() -> Iterator[None]:
    """``numpy.float_`` for as long as the block lasts."""
    if hasattr(np, "float_"):
        yield
        return
    np.float_ = np.float64  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.float_


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """``ControlModel``, ``set_raw_control`` and ``unwrap``."""
    with numpy_of_old():
        from repeng import ControlModel

    wrapped = ControlModel(model, layers_of(rows))
    try:
        set_control(wrapped, rows)
        yield Steered(model, lambda inputs, tokens: generate(wrapped, inputs, tokens))
    finally:
        wrapped.unwrap()


ADAPTER = Adapter(
    "repeng", KINDS, steer, package="repeng", per_row=True, needs_patch="numpy.float_ is lent to it at import"
)
