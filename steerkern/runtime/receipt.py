"""Receipts: what a session really wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..program import Site


@dataclass(frozen=True)
class PlanReceipt:
    """What one plan wrote.

    ``sites`` are those that ran with the plan; ``tokens`` counts the tokens written in all requests of the session;
    ``rows`` gives, for the last request, the cache indices ``(first, last)`` written in each row. Where an edit has a
    gate, the tokens are those on which the gate was asked.
    """

    name: str
    sites: tuple[Site, ...]
    tokens: int
    rows: Mapping[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class Receipt:
    """What each plan of a session wrote, by name; prints as one line per plan."""

    plans: Mapping[str, PlanReceipt]

    def __getitem__(self, name: str) -> PlanReceipt:
        return self.plans[name]

    def to_json(self) -> dict[str, Any]:
        """The receipt as JSON values."""
        return {
            name: {
                "sites": [str(site) for site in plan.sites],
                "tokens": plan.tokens,
                "rows": {str(row): [list(span) for span in spans] for row, spans in plan.rows.items()},
            }
            for name, plan in self.plans.items()
        }

    def __str__(self) -> str:
        return "\n".join(_line(plan) for plan in self.plans.values()) or "no plans"


def _line(plan: PlanReceipt) -> str:
    if not plan.tokens:
        return f"{plan.name}: wrote nothing"
    rows = "; ".join(
        f"row {row}: tokens " + ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
        for row, spans in list(plan.rows.items())[:8]
    )
    more = f"; and {len(plan.rows) - 8} rows more" if len(plan.rows) > 8 else ""
    return f"{plan.name}: {plan.tokens} tokens at {_sites(plan.sites)}; {rows}{more}"


def _sites(sites: tuple[Site, ...]) -> str:
    layers: dict[str, list[int]] = {}
    for site in sites:
        layers.setdefault(site.name, []).append(site.layer)
    return " and ".join(f"{name}[{_ranges(numbers)}]" for name, numbers in layers.items())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
