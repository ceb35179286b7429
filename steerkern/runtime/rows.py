"""The row map: which slot edits each row of the current forward. Everything about *who* and *when* is this map.

A forward processes batches one after the other; row ``b * S + s`` of a batch is token ``s`` of its sequence ``b``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ..program import Program
from .batch import Batch, Hit, Slots
from .prompts import Ints


class Part(NamedTuple):
    """What a forward holds of one batch: ``rows`` sequences of ``tokens`` tokens each, after ``past`` cached ones."""

    batch: Batch
    rows: int
    past: int
    tokens: int

    @property
    def decode(self) -> bool:
        """Whether it is one generated token per sequence."""
        return self.tokens == 1 and self.past >= self.batch.prompts.length


@dataclass
class Written:
    """What one plan wrote: tokens in all, and in the last request the cache indices ``[first, last]`` per row."""

    tokens: int = 0
    spans: dict[int, list[list[int]]] = field(default_factory=dict)

    def note(self, row: int | None, first: int, last: int) -> None:
        """Add the consecutive indices ``first..last`` of a row; a recomputed token counts once.

        Row None is a request of a server, of which nothing but the number of tokens is kept.
        """
        if row is None:
            self.tokens += last - first + 1
            return
        spans = self.spans.setdefault(row, [])
        if spans:
            first = max(first, spans[-1][1] + 1) if first >= spans[-1][0] else first
            if last <= spans[-1][1]:
                return
        self.tokens += last - first + 1
        if spans and spans[-1][1] == first - 1:
            spans[-1][1] = last
        else:
            spans.append([first, last])


@dataclass
class Run:
    """Decode steps that share one map: the same batches, each one token further every time."""

    parts: tuple[Part, ...]
    version: int
    pointer: int
    hits: list[tuple[int | None, int, list[Hit]]]
    """Per part: number of its first row in receipts if it has any, index at the first step, what plans write."""
    steps: int = 1

    def continues(self, parts: Sequence[Part], version: int) -> bool:
        """Whether ``parts`` are the next step of this run."""
        return (
            self.version == version
            and len(parts) == len(self.parts)
            and all(
                now.batch is then.batch and now.rows == then.rows and now.tokens == 1
                and now.past == then.past + self.steps
                for now, then in zip(parts, self.parts, strict=True)
            )
        )  # fmt: skip


class RowMap:
    """The slot of every row of the current forward, in a buffer whose address stays.

    ``slot [capacity] int32`` lives on the program's device. ``pointer`` is its address while some row of the current
    forward is steered, else 0, and ``count`` the number of rows of the forward, or -1 outside one. ``lock`` is held
    from the start of a forward to its end; who changes the program holds it too.
    """

    def __init__(self, program: Program, capacity: int = 4096) -> None:
        self.program = program
        self.slot = torch.full((capacity,), -1, dtype=torch.int32, device=program.device)
        self.count = -1
        self.pointer = 0
        self.tokens = 0
        """Tokens per sequence of the current forward; all its rows where it holds several batches."""
        self.request = -1
        """Number of the batch that the current forward belongs to, the first of several."""
        self.kept = 0
        """How many last tokens of each sequence blocks may be given that do not need the others; 0 is all."""
        self.written: dict[str, Written] = {}
        self.assigned: tuple[tuple[str, ...], ...] | None = None
        """The plans of each prompt of the batches to come; None gives every prompt every plan."""
        self.lock = threading.RLock()
        self._run: Run | None = None
        self._trimmed = 0

    def assign(self, rows: Sequence[Iterable[str]] | None) -> None:
        """Give each prompt of the coming batches its plans; None gives every prompt every plan.

        Raises:
            PlanError: a plan that the program does not hold.
        """
        for name in {name for row in rows or () for name in row}:
            self.program.get(name)
        self.assigned = None if rows is None else tuple(tuple(r) for r in rows)

    def begin(self) -> None:
        """Start a request whose rows receipts are to show: what earlier ones wrote is counted, but no longer shown."""
        self.forget()
        for written in self.written.values():
            written.spans = {}

    def forget(self) -> None:
        """Drop the map of the last decode steps, after anything that it depends on changed."""
        self.flush()
        self._run = None

    def advance(self, parts: Sequence[Part]) -> None:
        """Set the map for a forward of these parts.

        Raises:
            PlanError: as for :meth:`~steerkern.runtime.batch.Batch.slots`.
        """
        self.count = sum(part.rows * part.tokens for part in parts)
        self.tokens = parts[0].tokens if len(parts) == 1 else self.count
        self.request = parts[0].batch.number if parts else -1
        run = self._run
        if run is not None and run.continues(parts, self.program.version):
            run.steps += 1
            self.pointer = run.pointer
            return
        self.forget()
        self.program.begin()
        version, rows = self.program.version, 0
        found: list[tuple[Slots, list[Hit], int | None]] = []
        for part in parts:
            slots, hits = part.batch.slots(part.rows, part.past, part.tokens)
            found.append((slots, hits, None if part.batch.label else rows))
            rows += part.rows
        if self.program.version != version:  # a slot was given to another: ask again who has which
            found = [(part.batch.slots(part.rows, part.past, part.tokens)[0], hits, row)
                     for part, (_, hits, row) in zip(parts, found, strict=True)]  # fmt: skip
        self._store([slots for slots, _, _ in found])
        if all(part.decode and part.batch.steady for part in parts):
            seen = [(row, part.past, hits) for part, (_, hits, row) in zip(parts, found, strict=True)]
            self._run = Run(tuple(parts), self.program.version, self.pointer, seen)
            return
        for part, (_, hits, row) in zip(parts, found, strict=True):
            index = np.arange(part.past, part.past + part.tokens)
            for hit in hits:
                for first, last in _runs(index[hit.mask]):
                    self._note(part.batch, row, hit, first, last)

    def trim(self, count: int) -> None:
        """Let rows from ``count`` on be nobody's: a captured graph runs as many rows as it was captured with."""
        if count < self._trimmed:
            self.slot[count : self._trimmed].fill_(-1)
        self._trimmed = count

    def finish(self) -> None:
        """Leave the forward: rows of a norm called outside one are nobody's."""
        self.count, self.pointer = -1, 0

    def flush(self) -> None:
        """Note what the last decode steps wrote."""
        run = self._run
        if run is None:
            return
        for part, (row, past, hits) in zip(run.parts, run.hits, strict=True):
            for hit in hits:
                self._note(part.batch, row, hit, past, past + run.steps - 1)

    def _note(self, batch: Batch, row: int | None, hit: Hit, first: int, last: int) -> None:
        """A plan wrote the indices ``first..last`` of one sequence of a batch whose rows begin at ``row``."""
        self.written.setdefault(hit.plan, Written()).note(None if row is None else row + hit.row, first, last)
        if row is None:
            batch.written[hit.plan] = batch.written.get(hit.plan, 0) + last - first + 1

    def _store(self, slots: list[Slots]) -> None:
        flat = slots[0].reshape(-1) if len(slots) == 1 else np.concatenate([part.reshape(-1) for part in slots])
        if flat.size > self.slot.numel():
            self.slot = torch.full((2 * flat.size,), -1, dtype=torch.int32, device=self.program.device)
        self.pointer = self.slot.data_ptr() if (flat >= 0).any() else 0
        staged = torch.from_numpy(flat)
        if self.slot.is_cuda:  # torch keeps pinned memory until the stream has read it, so nothing waits here
            staged = staged.pin_memory()
        self.slot[: flat.size].copy_(staged, non_blocking=True)


def _runs(numbers: Ints) -> list[tuple[int, int]]:
    """First and last of every run of consecutive numbers."""
    if numbers.size < 2:
        return [(int(n), int(n)) for n in numbers]
    if numbers[-1] - numbers[0] == numbers.size - 1:
        return [(int(numbers[0]), int(numbers[-1]))]
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.concatenate(([0], breaks + 1))]
    lasts = numbers[np.concatenate((breaks, [numbers.size - 1]))]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))
