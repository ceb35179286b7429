"""Row maps: which slot edits each row of a forward. Everything about *who* and *when* is decided here.

A forward processes ``B`` sequences of ``S`` tokens; row ``b * S + s`` of the residual stream is token ``s`` of sequence
``b``. Tokens are placed by their *cache index* ``k``: the number of columns, padding included, before them. A prompt
occupies ``[start, stop)`` of its row; indices from the padded prompt length on were generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import PlanError
from ..program import Program, StepKey
from ..steps import Tokens

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Prompts:
    """Where the prompts of a batch lie: real tokens ``[start, stop)`` per row, ``length`` columns with padding."""

    start: Ints
    stop: Ints
    length: int

    @staticmethod
    def of(batch: int, length: int, mask: Tensor | None) -> Prompts:
        """From an attention mask ``[B, >= length]`` (1 real, 0 padding), or without padding.

        Raises:
            PlanError: a row without a real token.
        """
        if mask is None:
            return Prompts(np.zeros(batch, np.int64), np.full(batch, length, np.int64), length)
        real = mask[:, :length].to("cpu").numpy() != 0
        empty = np.flatnonzero(~real.any(1))
        if empty.size:
            raise PlanError(f"row {empty[0]}: the attention mask has no token")
        return Prompts(real.argmax(1), length - real[:, ::-1].argmax(1), length)

    def __len__(self) -> int:
        return len(self.start)

    def repeated(self, times: int) -> Prompts:
        """The same prompts with each row ``times`` times: beams and returned sequences."""
        return Prompts(np.repeat(self.start, times), np.repeat(self.stop, times), self.length)

    def select(self, tokens: Tokens, index: Ints) -> Bools:
        """``[B, S]``: which of the tokens at cache indices ``index [S]`` lie in ``tokens``.

        Raises:
            PlanError: a position that a prompt of the batch does not have.
        """
        start, stop = self.start[:, None], self.stop[:, None]
        prompt = (start <= index) & (index < stop)
        generated = np.broadcast_to(index >= self.length, prompt.shape)
        if tokens.positions is not None:
            chosen = np.zeros_like(prompt)
            for p in tokens.positions:
                at = (start if p >= 0 else stop) + p
                outside = np.flatnonzero((at < start) | (at >= stop))
                if outside.size:
                    row = int(outside[0])
                    raise PlanError(
                        f"position {p}: the prompt of row {row} has {self.stop[row] - self.start[row]} tokens"
                    )
                chosen |= index == at
            return chosen & prompt
        selected = {"all": prompt | generated, "prompt": prompt, "decode": generated}[tokens.phase]
        position = np.where(generated, index - self.length + stop, index) - start
        inside = position >= tokens.start
        if tokens.stop is not None:
            inside &= position < tokens.stop
        return selected & inside


@dataclass
class Written:
    """What one plan wrote: tokens in all, and in the last request the cache indices ``[first, last]`` per row."""

    tokens: int = 0
    spans: dict[int, list[list[int]]] = field(default_factory=dict)

    def note(self, row: int, first: int, last: int) -> None:
        """Add the consecutive indices ``first..last`` of a row; a recomputed token counts once."""
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


class RowMap:
    """The slot of every row of the current forward, in a buffer whose address stays.

    ``slot [capacity] int32`` lives on the program's device. ``pointer`` is its address while some row of the current
    forward is steered, else 0, and ``count`` the number of rows of the forward, or -1 outside one.
    """

    def __init__(self, program: Program, capacity: int = 4096) -> None:
        self.program = program
        self.slot = torch.full((capacity,), -1, dtype=torch.int32, device=program.device)
        self.count = -1
        self.pointer = 0
        self.tokens = 0
        """Tokens per sequence of the current forward."""
        self.requests = 0
        """Requests begun so far."""
        self.next_index = 0
        """Cache index of the token after the last forward's."""
        self.kept = 0
        """How many last tokens of each sequence blocks may be given that do not need the others; 0 is all."""
        self.written: dict[str, Written] = {}
        self._assigned: tuple[tuple[str, ...], ...] | None = None
        self._prompts: Prompts | None = None
        self._decode: tuple[int, list[tuple[str, list[int]]], int] | None = None  # batch, (plan, rows), pointer
        self._first, self._last = 0, -1  # cache indices covered by the cached decode map and not yet noted

    def assign(self, rows: Sequence[Iterable[str]] | None) -> None:
        """Give each prompt of a batch its plans; None gives every row every plan.

        Raises:
            PlanError: a plan that the program does not hold.
        """
        for name in {name for row in rows or () for name in row}:
            self.program.get(name)
        self._assigned = None if rows is None else tuple(tuple(r) for r in rows)
        self.forget()

    def begin(self, prompts: Prompts) -> None:
        """Start a request: from here on tokens are prompt or generated with respect to ``prompts``.

        Raises:
            PlanError: rows were assigned for another number of prompts.
        """
        if self._assigned is not None and len(self._assigned) != len(prompts):
            raise PlanError(f"rows name {len(self._assigned)} sequences, the batch has {len(prompts)} prompts")
        self.forget()
        for written in self.written.values():
            written.spans = {}
        self._prompts = prompts
        self.requests += 1

    @property
    def prompts(self) -> Prompts | None:
        """The prompts of the current request."""
        return self._prompts

    @property
    def assigned(self) -> set[str]:
        """Names of the plans that rows were given by name."""
        return {name for row in self._assigned or () for name in row}

    def forget(self) -> None:
        """Drop the cached map of decode steps, after anything that it depends on changed."""
        self.flush()
        self._decode = None
        self._first, self._last = 0, -1

    def advance(self, batch: int, tokens: int, past: int) -> None:
        """Set the map for a forward of ``batch`` sequences and ``tokens`` tokens each, after ``past`` cached ones."""
        prompts = self._prompts
        assert prompts is not None
        self.count, self.tokens = batch * tokens, tokens
        self.next_index = past + tokens
        decode = tokens == 1 and past >= prompts.length
        if decode and self._decode is not None and self._decode[0] == batch and past == self._last + 1:
            self._last = past
            self.pointer = self._decode[2]
            return
        self.forget()
        if batch % len(prompts):
            raise PlanError(f"a forward of {batch} sequences inside a request of {len(prompts)} prompts")
        times = batch // len(prompts)
        index = np.arange(past, past + tokens)
        slots, hits = self._slots(prompts.repeated(times), times, index)
        self._store(slots)
        steady = all(
            step.tokens.start == 0 and step.tokens.stop is None for plan in self.program.plans for step in plan.steps
        )
        if decode and steady:
            rows = [(name, np.flatnonzero(mask[:, 0]).tolist()) for name, mask in hits.items()]
            self._decode, self._first, self._last = (batch, rows, self.pointer), past, past
            return
        for name, mask in hits.items():
            for row, columns in enumerate(mask):
                for first, last in _runs(index[columns]):
                    self._written(name).note(row, first, last)

    def finish(self) -> None:
        """Leave the forward: rows of a norm called outside one are nobody's."""
        self.count, self.pointer = -1, 0

    def _written(self, name: str) -> Written:
        return self.written.setdefault(name, Written())

    def flush(self) -> None:
        """Note what the cached decode steps wrote."""
        if self._decode is not None and self._last >= self._first:
            for name, rows in self._decode[1]:
                for row in rows:
                    self._written(name).note(row, self._first, self._last)
            self._first = self._last + 1

    def _slots(self, prompts: Prompts, times: int, index: Ints) -> tuple[NDArray[np.int32], dict[str, Bools]]:
        """``[B, S]`` slots, and per plan the mask of the tokens that it writes."""
        everyone = tuple(plan.name for plan in self.program.plans)
        assigned = self._assigned
        rows = [everyone] * len(prompts) if assigned is None else [assigned[b // times] for b in range(len(prompts))]
        shape = (len(prompts), len(index))
        keys: list[StepKey] = []
        steps = sum(len(plan.steps) for plan in self.program.plans)
        code = np.zeros(shape, dtype=np.int64 if steps < 63 else object)  # one bit per step
        hits: dict[str, Bools] = {}
        for plan in self.program.plans:
            mine = np.array([plan.name in names for names in rows])[:, None]
            for i, step in enumerate(plan.steps):
                mask = prompts.select(step.tokens, index) & mine if mine.any() else np.zeros(shape, bool)
                hits[plan.name] = hits.get(plan.name, False) | mask
                code[mask] += 1 << len(keys)
                keys.append((plan.name, i))
        slots = np.full(shape, -1, np.int32)
        for bits in set(np.unique(code).tolist()) - {0}:
            chosen = [key for i, key in enumerate(keys) if bits >> i & 1]
            slots[code == bits] = self.program.slot(chosen)
        return slots, hits

    def _store(self, slots: NDArray[np.int32]) -> None:
        count = slots.size
        if count > self.slot.numel():
            self.slot = torch.full((2 * count,), -1, dtype=torch.int32, device=self.program.device)
        self.pointer = self.slot.data_ptr() if (slots >= 0).any() else 0
        staged = torch.from_numpy(slots.reshape(-1))
        if self.slot.is_cuda:  # torch keeps pinned memory until the stream has read it, so nothing waits here
            staged = staged.pin_memory()
        self.slot[:count].copy_(staged, non_blocking=True)


def _runs(numbers: Ints) -> list[tuple[int, int]]:
    """First and last of every run of consecutive numbers."""
    if numbers.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.concatenate(([0], breaks + 1))]
    lasts = numbers[np.concatenate((breaks, [numbers.size - 1]))]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))
