"""What steering is when it is written by hand: a forward hook on each decoder block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .adapter import Adapter, Rows, Steered, block_outputs, editing, generate


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """Hooks that return the edited output of each block."""
    with editing(block_outputs(model, rows)):
        yield Steered(model, lambda inputs, tokens: generate(model, inputs, tokens))


ADAPTER = Adapter("hand-written hook", ("add", "ablate", "clamp", "rank 4"), steer, per_row=True)
