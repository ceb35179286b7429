"""Where the prompts of a batch lie, and which of its tokens a scope means.

Tokens are placed by their *cache index* ``k``: the number of columns, padding included, before them. A prompt occupies
``[start, stop)`` of its row; indices from the padded prompt length on were generated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import PlanError
from ..steps import Tokens
from .events import Events

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
        if times == 1:
            return self
        return Prompts(np.repeat(self.start, times), np.repeat(self.stop, times), self.length)

    def place(self, position: int) -> Ints:
        """Cache index ``[B]`` of a prompt position, negative ones counted from the prompt's end.

        Raises:
            PlanError: a position that a prompt of the batch does not have.
        """
        at: Ints = (self.start if position >= 0 else self.stop) + position
        outside = np.flatnonzero((at < self.start) | (at >= self.stop))
        if outside.size:
            row = int(outside[0])
            raise PlanError(
                f"position {position}: the prompt of row {row} has {self.stop[row] - self.start[row]} tokens"
            )
        return at

    def select(self, tokens: Tokens, index: Ints, events: Events | None = None) -> Bools:
        """``[B, S]``: which of the tokens at cache indices ``index [S]`` lie in ``tokens``.

        ``events`` knows where markers ended; without it a scope with events selects nothing after them.

        Raises:
            PlanError: a position that a prompt of the batch does not have.
        """
        start, stop = self.start[:, None], self.stop[:, None]
        prompt = (start <= index) & (index < stop)
        generated = np.broadcast_to(index >= self.length, prompt.shape)
        last = np.broadcast_to(index == stop - 1, prompt.shape)
        if tokens.positions is not None:
            chosen = np.zeros_like(prompt)
            for p in tokens.positions:
                chosen |= index == self.place(p)[:, None]
            selected = chosen & prompt
        else:
            phases = {"all": prompt | generated, "prompt": prompt, "decode": generated, "reply": generated | last}
            selected = phases[tokens.phase]
        if tokens.positions is None and tokens.steady:
            return selected
        position = np.where(generated, index - self.length + stop, index) - start
        size = stop - start
        inside = selected & (position >= (tokens.start if tokens.start >= 0 else size + tokens.start))
        if tokens.stop is not None:
            inside &= position < (tokens.stop if tokens.stop >= 0 else size + tokens.stop)
        origin = {"decode": stop - start, "reply": stop - start - 1}.get(tokens.phase, np.zeros_like(start))
        count = position - origin
        if tokens.markers:
            live, since = (events or Events()).live(tokens, index, len(self))
            inside &= live
            if tokens.after is not None:
                count = position - self._position(since)
        if tokens.first is not None:
            inside &= count < tokens.first
        return inside & (count % tokens.every == 0) if tokens.every != 1 else inside

    def _position(self, index: Ints) -> Ints:
        """Position, counted without padding, of the token after cache index ``index [B, S]``."""
        start, stop = self.start[:, None], self.stop[:, None]
        return np.where(index >= self.length, index - self.length + stop, index) - start + 1
