"""The bank: the vectors of all plans as rows of one device table, each vector once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import PlanError


class Bank:
    """``table [R, H]`` float32 of fixed address on ``device``; a vector that several plans share takes one row.

    Vectors are told apart by the address of their data, as :func:`~steerkern.packing.distinct` gives it.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.table = torch.zeros(rows, width, device=device)
        self.free = list(range(rows - 1, -1, -1))
        self._rows: dict[int, int] = {}
        self._plans: Counter[int] = Counter()  # address -> plans that use the vector

    def hold(self, vectors: Mapping[int, Tensor], name: str) -> dict[int, int]:
        """Take in the vectors ``[H]`` of plan ``name`` by address, and say in which rows they stand.

        Raises:
            PlanError: there are not as many rows free; nothing changed then.
        """
        new = [address for address in vectors if address not in self._rows]
        if len(new) > len(self.free):
            of = f"{len(self.free)} of {len(self.table)}"
            raise PlanError(f"plan {name!r} needs {len(new)} bank rows, {of} are free")
        if new:
            rows = [self.free.pop() for _ in new]
            self._rows.update(zip(new, rows, strict=True))
            self.table[rows] = torch.stack([vectors[address].to(self.table) for address in new])
        self._plans.update(vectors.keys())
        return {address: self._rows[address] for address in vectors}

    def drop(self, addresses: Iterable[int]) -> None:
        """A plan with the vectors at these addresses goes; rows that no plan uses any more are free."""
        for address in addresses:
            self._plans[address] -= 1
            if not self._plans[address]:
                del self._plans[address]
                self.free.append(self._rows.pop(address))
