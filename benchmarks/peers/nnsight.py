"""nnsight: the edit is written inside a tracing context around ``generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .adapter import Adapter, Inputs, Rows, Steered, change, layers_of


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """``generate`` with ``tracer.iter``, or a ``tracer.invoke`` per row where the rows differ."""
    import nnsight

    traced = nnsight.TransformersModel(model)

    def together(inputs: Inputs, tokens: int) -> None:
        changes = [(traced.model.layers[layer], change(rows, layer)) for layer in layers_of(rows)]
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        with traced.generate(dict(inputs), **options) as tracer:
            for _ in tracer.iter[:]:
                for block, edit in changes:
                    block.output[:] = edit(block.output)

    yield Steered(model, together)


ADAPTER = Adapter("nnsight", ("add", "ablate", "clamp", "rank 4"), steer, package="nnsight", per_row=True)
