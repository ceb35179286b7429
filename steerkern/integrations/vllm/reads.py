"""States that decisions ask for, kept by the forward itself: rows of the residual stream, copied to a fixed place.

A forward's graph may be compiled or captured, so the copy is an op of that graph: it takes the rows that the step
wants, one for each request whose prompt ends in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SCHEMA = "keep_rows_(Tensor(a!) kept, Tensor rows, Tensor x, Tensor? residual) -> ()"


class Reads:
    """Where the states of some sites go.

    Args:
        sites: numbers of the sites that decisions read.
        most: most requests whose prompts end in one forward.
    """

    def __init__(self, sites: Iterable[int], most: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.full((most,), -1, dtype=torch.int32, device=device)
        """``[most]`` int32: rows of the coming forward to keep, -1 for none."""
        self.states = {number: torch.zeros(most, width, dtype=dtype, device=device) for number in sites}
        """Site number -> ``[most, H]``: what was kept."""
        self._wanted = 0

    def want(self, rows: Sequence[int]) -> None:
        """Say which rows the coming forward keeps, in their order."""
        if not self.states or not (rows or self._wanted):
            return
        several = [*rows, *[-1] * (max(self._wanted, len(rows)) - len(rows))]
        self.rows[: len(several)] = torch.tensor(several, dtype=torch.int32).to(self.rows.device)
        self._wanted = len(rows)


def _keep_rows(kept: Tensor, rows: Tensor, x: Tensor, residual: Tensor | None) -> None:
    flat = x.reshape(-1, x.shape[-1])
    if rows.device.type == "cpu":
        rows = rows[: int((rows >= 0).sum())]
        if not rows.numel():
            return
    picked = flat.index_select(0, rows.clamp(min=0).long())
    if residual is not None:
        picked = picked + residual.reshape(-1, x.shape[-1]).index_select(0, rows.clamp(min=0).long())
    kept[: rows.numel()].copy_(picked)


def _fake(kept: Tensor, rows: Tensor, x: Tensor, residual: Tensor | None) -> None:
    return


_library = torch.library.Library("steerkern", "FRAGMENT")
_library.define(SCHEMA)
_library.impl("keep_rows_", _keep_rows, "CompositeExplicitAutograd")
torch.library.register_fake("steerkern::keep_rows_", _fake, lib=_library)
