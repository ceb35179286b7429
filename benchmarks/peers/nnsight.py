"""nnsight: the edit is written inside a tracing context around ``generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .adapter import Adapter, Change, Inputs, Rows, Steered, change, layers_of, tokenizer

OPTIONS = {"do_sample": False}


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """``generate`` with ``tracer.iter``; a ``tracer.invoke`` per row where the rows differ."""
    import nnsight

    traced = nnsight.TransformersModel(model, tokenizer=tokenizer())
    if len(rows) == 1:
        yield Steered(model, _together(traced, rows))
    else:
        yield Steered(model, _apart(traced, rows))


def _together(traced: Any, rows: Rows) -> Callable[[Inputs, int], None]:
    edits = _edits(traced, rows)

    def run(inputs: Inputs, tokens: int) -> None:
        with traced.generate(dict(inputs), max_new_tokens=tokens, min_new_tokens=tokens, **OPTIONS) as tracer:
            for _ in tracer.iter[:]:
                for block, edit in edits:
                    block.output[:] = edit(block.output)

    return run


def _apart(traced: Any, rows: Rows) -> Callable[[Inputs, int], None]:
    edits = [[] if edit is None else _edits(traced, [edit]) for edit in rows]

    def run(inputs: Inputs, tokens: int) -> None:
        each = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(rows))]
        with traced.generate(max_new_tokens=tokens, min_new_tokens=tokens, **OPTIONS) as tracer:
            for row, own in zip(each, edits, strict=True):
                with tracer.invoke(row):
                    for _ in tracer.iter[:tokens]:  # a row without edits would never leave an open slice
                        for block, edit in own:
                            block.output[:] = edit(block.output)

    return run


def _edits(traced: Any, rows: Rows) -> list[tuple[Any, Change]]:
    return [(traced.model.layers[layer], change(rows, layer)) for layer in layers_of(rows)]


ADAPTER = Adapter(
    "nnsight",
    ("add", "ablate", "clamp", "rank 4"),
    steer,
    package="nnsight",
    per_row=True,
    authors_figure="an empty trace 308 us, 30 to 80 us per access",
)
