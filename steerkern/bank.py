"""The bank: the vectors of all plans as rows of one device table, each vector once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import PlanError


class Bank:
    """``table [R, H]`` float32 of fixed address on ``device``; a vector that several plans share takes one row.

    Vectors are told apart by the address of their data, which the plans that are held keep alive.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.table = torch.zeros(rows, width, device=device)
        self.free = list(range(rows - 1, -1, -1))
        self._rows: dict[int, int] = {}  # address -> row
        self._addresses = [0] * rows
        self._plans = [0] * rows

    def hold(self, stacks: Mapping[int, Tensor], name: str) -> dict[int, list[int]]:
        """Take in the stacks ``[k, H]`` of plan ``name``, and say in which row each vector of each stack stands.

        Raises:
            PlanError: there are not as many rows free; nothing changed then.
        """
        parts = {part: [(vector.data_ptr(), vector) for vector in stack] for part, stack in stacks.items()}
        new = {address: vector for part in parts.values() for address, vector in part if address not in self._rows}
        if len(new) > len(self.free):
            of = f"{len(self.free)} of {len(self.table)}"
            raise PlanError(f"plan {name!r} needs {len(new)} bank rows, {of} are free")
        if new:
            rows = [self.free.pop() for _ in new]
            self.table[rows] = torch.stack([vector.to(self.table) for vector in new.values()])
            for address, row in zip(new, rows, strict=True):
                self._rows[address], self._addresses[row] = row, address
        held = {part: [self._rows[address] for address, _ in several] for part, several in parts.items()}
        for row in _distinct(held):
            self._plans[row] += 1
        return held

    def drop(self, held: Mapping[int, list[int]]) -> None:
        """Let the rows of a plan go, as :meth:`hold` gave them; those that no plan uses any more are free."""
        for row in _distinct(held):
            self._plans[row] -= 1
            if not self._plans[row]:
                del self._rows[self._addresses[row]]
                self.free.append(row)


def _distinct(held: Mapping[int, Iterable[int]]) -> set[int]:
    return {row for rows in held.values() for row in rows}
