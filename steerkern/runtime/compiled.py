"""The row map inside a compiled graph.

Python that sets the row map would be traced away, so a compiled forward calls one opaque op instead, which runs the
same Python on the real tensors of each call. It must not be captured into a CUDA graph: the map is host work.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor


class RowSetter(Protocol):
    """What the op calls: a session."""

    def set_rows(self, batch: int, tokens: int, past: int, mask: Tensor | None, ids: Tensor | None) -> Tensor:
        """The slots ``[batch * tokens]`` of a forward after ``past`` cached tokens."""


_SETTERS: weakref.WeakValueDictionary[int, RowSetter] = weakref.WeakValueDictionary()
_LIBRARY = torch.library.Library("steerkern", "FRAGMENT")
_LIBRARY.define(
    "rows_(Tensor(a!) slot, Tensor? mask, Tensor past, Tensor? ids, SymInt batch, SymInt tokens, int setter) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else (),
)


def register(setter: RowSetter) -> int:
    """A number under which the op finds ``setter`` for as long as that lives."""
    number = id(setter)
    _SETTERS[number] = setter
    return number


def set_rows(
    slot: Tensor, mask: Tensor | None, past: int | Tensor, ids: Tensor | None, batch: int, tokens: int, setter: int
) -> None:
    """Set the row map from inside a traced forward; ``slot`` is the map's buffer, which the op writes."""
    if not isinstance(past, Tensor):
        past = torch.full((), past, dtype=torch.int64)
    torch.ops.steerkern.rows_(slot, mask, past, ids, batch, tokens, setter)


def _rows(
    slot: Tensor, mask: Tensor | None, past: Tensor, ids: Tensor | None, batch: int, tokens: int, setter: int
) -> None:
    session = _SETTERS.get(setter)
    if session is None:
        slot.fill_(-1)
        return
    slots = session.set_rows(batch, tokens, int(past), mask, ids)
    slot[: slots.numel()].copy_(slots)  # the graph may have handed in a copy of the map's buffer


def _rows_fake(
    slot: Tensor, mask: Tensor | None, past: Tensor, ids: Tensor | None, batch: int, tokens: int, setter: int
) -> None:
    return None


_LIBRARY.impl("rows_", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("steerkern::rows_", _rows_fake, lib=_LIBRARY)
