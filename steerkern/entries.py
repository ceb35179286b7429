"""The tables of entries: one block for each combination of steps, and per slot and site the span of it that acts.

Changes are made to the tables on the host, by NumPy, and :meth:`Entries.upload` brings them to the device; on the CPU
the two are one memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .ops.schemas import Field, Link
from .packing import Combination, Packed


@dataclass
class Block:
    """The entries of one combination and the slots that share them."""

    first: int
    size: int
    sites: NDArray[np.int32]
    """Numbers of the sites reached."""
    spans: NDArray[np.int32]
    """``[sites reached, 3]``: first entry within the block, number of entries, mode."""
    longest: int
    """Most entries at one site."""
    slots: set[int] = field(default_factory=set)


class Entries:
    """``links [4, E]``, ``fields [7, E]`` and ``span [sites, S, 3]`` on ``device``, all of fixed address.

    Blocks stand without gaps: what the last slot of one leaves is closed at once.
    """

    def __init__(self, sites: int, slots: int, entries: int, device: torch.device) -> None:
        self._staged = (
            torch.zeros(len(Link), entries, dtype=torch.int32),
            torch.zeros(len(Field), entries),
            torch.zeros(sites, slots, 3, dtype=torch.int32),
        )
        self._links, self._fields, self._span = (table.numpy() for table in self._staged)
        self.links, self.fields, self.span = (table.to(device) for table in self._staged)
        self.blocks: dict[Combination, Block] = {}
        self.capacity = entries
        self.filled = 0
        """Entries in use: 0 to ``filled - 1``."""
        self.longest = 0
        """Most entries that any slot holds at one site."""

    @property
    def room(self) -> int:
        """Entries that are free."""
        return self.capacity - self.filled

    def append(self, key: Combination, packed: Packed) -> None:
        """Put down the entries of a combination, for which there is room."""
        spans = np.array(packed.spans, np.int32).reshape(-1, 4)
        longest = int(spans[:, 2].max(initial=0))
        block = self.blocks[key] = Block(self.filled, len(packed.links), spans[:, 0], spans[:, 1:], longest)
        self.filled += block.size
        self.longest = max(self.longest, longest)
        self._links[:, block.first : self.filled] = np.array(packed.links, np.int32).reshape(-1, len(Link)).T
        self.rewrite(key, packed)

    def rewrite(self, key: Combination, packed: Packed) -> None:
        """Give the entries of a combination other fields."""
        block = self.blocks[key]
        fields = np.array(packed.fields, np.float32).reshape(-1, len(Field))
        self._fields[:, block.first : block.first + block.size] = fields.T

    def point(self, slot: int, key: Combination) -> None:
        """Let a slot mean a combination."""
        block = self.blocks[key]
        block.slots.add(slot)
        self._span[block.sites, slot] = np.add(block.spans, (block.first, 0, 0))

    def clear(self, slot: int, key: Combination) -> None:
        """Let a slot that meant a combination mean nothing; the block goes with its last slot."""
        block = self.blocks[key]
        block.slots.remove(slot)
        self._span[:, slot] = 0
        if not block.slots:
            del self.blocks[key]
            self._close(block.first, block.size)

    def _close(self, first: int, size: int) -> None:
        """Move what stands behind a gap into it."""
        self.longest = max((block.longest for block in self.blocks.values()), default=0)
        self.filled -= size
        if first == self.filled:
            return
        for table in (self._links, self._fields):
            table[:, first : self.filled] = table[:, first + size : self.filled + size]  # NumPy minds the overlap
        start = self._span[..., 0]
        np.subtract(start, size, out=start, where=start > first)
        for block in self.blocks.values():
            block.first -= size if block.first > first else 0

    def upload(self) -> None:
        """Bring what was changed to the device."""
        used = slice(0, self.filled)  # nothing points beyond
        links, fields, span = self._staged
        if self.span is not span:
            self.links[:, used].copy_(links[:, used])
            self.fields[:, used].copy_(fields[:, used])
            self.span.copy_(span)
