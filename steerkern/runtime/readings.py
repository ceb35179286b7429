"""Coordinates that probes read while the model runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..program import Program


class Readings:
    """Collects, per plan, the coordinates of one site over the forwards of a request."""

    def __init__(self, program: Program, number: int, plans: list[str]) -> None:
        self.program = program
        self.number = number
        self.plans = plans
        self._request = -1
        self._parts: dict[str, list[Tensor]] = {}

    def buffer(self, rows: int) -> Tensor:
        """``[rows, T]`` for the kernel to write coordinates into."""
        return torch.full((rows, max(1, self.program.entries_per_row)), torch.nan, device=self.program.device)

    def take(self, request: int, tokens: int, slot: Tensor, trace: Tensor) -> None:
        """Keep what a forward of ``tokens`` tokens per sequence read; a new request drops the last one's."""
        if request != self._request:
            self._request, self._parts = request, {}
        for name in self.plans:
            read: dict[int, list[int]] = {
                s: self.program.probe_columns(self.number, s, name) for s in slot.unique().tolist() if s >= 0
            }
            width = max(map(len, read.values()), default=0)
            if width == 0:
                continue
            part = torch.full((slot.numel(), width), torch.nan)
            for s, columns in read.items():
                if columns:
                    part[slot == s] = trace[slot == s][:, columns].to("cpu")
            self._parts.setdefault(name, []).append(part.view(-1, tokens, width))

    def of(self, name: str) -> Tensor | None:
        """``[B, tokens, k]`` of the last request: NaN where the plan did not read; None if it never did."""
        parts = self._parts.get(name)
        return None if not parts else torch.cat(parts, 1)
