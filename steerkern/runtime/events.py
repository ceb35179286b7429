"""Events: where markers (token sequences such as ``</think>``) ended in the sequences of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..steps import Marker, Tokens

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

PADDING, NO_TOKEN = -1, -2
"""Stand where there is no token, and where it is not known; no marker holds them, but one may reach across padding."""


class Events:
    """The tokens of a batch by cache index, and for each marker the last place up to each index where it ended.

    Tokens may be seen again from an earlier index on (a cache that was cropped): what followed is forgotten.
    """

    def __init__(self, markers: tuple[Marker, ...] = ()) -> None:
        self.markers = tuple(dict.fromkeys(markers))
        self._ids = np.zeros((0, 0), np.int64)
        self._previous = np.zeros((0, 0), np.int64)  # of each index, the one before it that holds no padding
        self._ended = {marker: np.zeros((0, 0), np.int64) for marker in self.markers}

    def watching(self, markers: tuple[Marker, ...]) -> Events:
        """The same tokens, looked through for other markers too."""
        made = Events((*self.markers, *markers))
        if self._ids.size:
            made.see(0, self._ids)
        return made

    def see(self, past: int, ids: Ints) -> None:
        """Take in the tokens ``ids [B, S]`` at cache indices ``past .. past + S - 1``."""
        rows, tokens = ids.shape
        end = past + tokens
        if self._ids.shape[0] != rows or self._ids.shape[1] < end:
            self._grow(rows, max(end, 2 * self._ids.shape[1]), past)
        self._ids[:, past:end] = ids
        self._chain(past, end)
        for marker in self.markers:
            here = np.where(self._ends(marker, past, end), np.arange(past, end), -1)
            before = self._ended[marker][:, past - 1 : past] if past else np.full((rows, 1), -1)
            if before.shape[1] == 0:
                before = np.full((rows, 1), -1)
            self._ended[marker][:, past:end] = np.maximum.accumulate(np.maximum(here, before), 1)

    def live(self, tokens: Tokens, index: Ints, rows: int) -> tuple[Bools, Ints]:
        """``[B, S]``: whether the events of ``tokens`` let the tokens at ``index [S]`` in, and where the last
        occurrence of ``after`` ended before them (-1: none yet).
        """
        opened = self._before(tokens.after, index, rows)
        closed = self._before(tokens.until, index, rows)
        live = opened >= 0 if tokens.after is not None else np.ones_like(opened, bool)
        return live & ((closed < 0) | (opened > closed)), opened

    def _before(self, marker: Marker | None, index: Ints, rows: int) -> Ints:
        """``[B, S]``: the last end of a marker at an index below each of ``index``."""
        ended = None if marker is None else self._ended.get(marker)
        found = np.full((rows, len(index)), -1, np.int64)
        if ended is None or ended.shape[0] != rows or ended.shape[1] == 0:
            return found
        inside = (index > 0) & (index <= ended.shape[1])
        found[:, inside] = ended[:, index[inside] - 1]
        return found

    def _ends(self, marker: Marker, first: int, end: int) -> Bools:
        """``[B, end - first]``: whether one of the marker's sequences ends at each index."""
        hits = np.zeros((len(self._ids), end - first), bool)
        for sequence in marker:
            whole = np.ones_like(hits)
            at = np.broadcast_to(np.arange(first, end), hits.shape)
            for token in reversed(sequence):
                known = np.maximum(at, 0)
                whole &= (at >= 0) & (np.take_along_axis(self._ids, known, 1) == token)
                at = np.take_along_axis(self._previous, known, 1)
            hits |= whole
        return hits

    def _chain(self, past: int, end: int) -> None:
        """Links the indices ``past .. end - 1`` to those before them: between prompt and reply there may be padding."""
        here = np.where(self._ids[:, past:end] == PADDING, -1, np.arange(past, end))
        before = np.full((len(here), 1), -1)
        if past:
            last = self._previous[:, past - 1 : past]
            before = np.where(self._ids[:, past - 1 : past] == PADDING, last, past - 1)
        self._previous[:, past:end] = np.maximum.accumulate(np.concatenate([before, here[:, :-1]], 1), 1)

    def _grow(self, rows: int, columns: int, past: int) -> None:
        kept = self._ids[:, :past] if len(self._ids) == rows else self._ids[:0]
        self._ids = _larger(kept, rows, columns, NO_TOKEN)
        kept = self._previous[:, :past] if len(self._previous) == rows else self._previous[:0]
        self._previous = _larger(kept, rows, columns, -1)
        for marker, ended in self._ended.items():
            kept = ended[:, :past] if len(ended) == rows else ended[:0]
            self._ended[marker] = _larger(kept, rows, columns, -1)


def _larger(old: Ints, rows: int, columns: int, value: int) -> Ints:
    made = np.full((rows, columns), value, np.int64)
    made[: len(old), : old.shape[1]] = old
    return made
