"""steerkern itself, through the same door as everybody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import steerkern as sk

from .adapter import Adapter, Edit, Rows, Steered, generate


def plan(edit: Edit, name: str) -> sk.Plan:
    """The plan of an edit at the outputs of its blocks."""
    parts = [sk.Plan(_edit(edit, layer), layers=layer, site="resid_post", name=name) for layer in edit.vectors]
    return sum(parts[1:], parts[0])


def _edit(edit: Edit, layer: int) -> sk.Edit:
    v = edit.vectors[layer]
    if edit.kind == "add":
        return sk.add(v[0], edit.strength)
    return sk.clamp(v, edit.strength) if edit.kind == "clamp" else sk.ablate(v)


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """A session with a plan per distinct edit."""
    names = [None if edit is None else f"p{i}" for i, edit in enumerate(rows)]
    plans = [plan(edit, f"p{i}") for i, edit in enumerate(rows) if edit is not None]
    with sk.steer(model, plans) as session:
        if len(rows) > 1:
            session.rows(names)
        yield Steered(model, lambda inputs, tokens: generate(model, inputs, tokens))


ADAPTER = Adapter("steerkern", ("add", "ablate", "clamp", "rank 4"), steer, per_row=True)
