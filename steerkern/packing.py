"""From the steps that meet on a row to the table columns of their entries, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .edits import KINDS, Edit, Rows
from .errors import PlanError
from .ops.schemas import MAX_ENTRIES, Flag, Mode
from .plan import Plan
from .steps import Step

StepKey = tuple[str, int]
"""A plan's name and the number of the step in it."""

Combination = frozenset[StepKey]
"""Steps that act on the same row."""


class Site(NamedTuple):
    """One place in the model, by block and name; ``Site(L - 1, "resid_post")`` is the final norm's input."""

    layer: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}[{self.layer}]"


@dataclass(eq=False)
class Held:
    """A plan in the program."""

    plan: Plan
    number: int
    """Plans that came later have higher ones, and act later on a row."""
    places: dict[Step, dict[int, int]]
    """Per step, the sites that it reaches: number -> layer as the plan counts it."""
    bank_rows: dict[int, list[int]]
    """``id`` of a :class:`~steerkern.edits.Rows` or Gate of the plan -> bank rows of its vectors."""
    scale: float = 1.0
    changes: int = 0
    """How often the scale became another."""


class Meeting(NamedTuple):
    """One step as it acts at one site, and the layer whose vectors it has there; None if any layer has the same."""

    held: Held
    step: Step
    layer: int | None


@dataclass
class Packed:
    """The entries of one combination of steps over all sites, as columns of ``links`` and ``fields``."""

    links: list[list[int]] = field(default_factory=list)
    fields: list[list[float]] = field(default_factory=list)
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Site, first entry within the combination, number of entries, :class:`Mode`."""


def pack(steps: Iterable[tuple[Held, Step]], sites: Sequence[Site]) -> Packed:
    """The columns of all steps that meet on a row; sites at which the same vectors act share their entries.

    Raises:
        PlanError: more than 64 entries on a row, or steps that disagree on ``keep_norm`` or have several controllers.
    """
    at_site: dict[int, list[Meeting]] = {}
    for held, step in steps:
        by_layer = any(None not in edit.rows for edit in step.edits)
        for number, layer in held.places[step].items():
            at_site.setdefault(number, []).append(Meeting(held, step, layer if by_layer else None))
    packed = Packed()
    spans: dict[tuple[Meeting, ...], tuple[int, int, int]] = {}
    for number in sorted(at_site):
        here = tuple(at_site[number])
        if here not in spans:
            spans[here] = _pack_site(packed, sites[number], here)
        packed.spans.append((number, *spans[here]))
    return packed


def _pack_site(packed: Packed, site: Site, here: Sequence[Meeting]) -> tuple[int, int, int]:
    """Append the entries of the steps that meet at a site: the first of them, their number and the mode."""
    first, mode = len(packed.links), _mode(site, here)
    for held, step, layer in here:
        for edit in step.edits:
            rows = edit.rows[None if None in edit.rows else layer]
            scale = step.scale * held.scale
            _pack_edit(packed, first, edit, rows, held.bank_rows, scale, step.controller is not None)
    size = len(packed.links) - first
    if size > MAX_ENTRIES:
        names = who(one.held for one in here)
        raise PlanError(f"{site}: plans {names} put {size} entries on one row, allowed are {MAX_ENTRIES}")
    return first, size, mode


def vectors(edit: Edit) -> dict[int, Tensor]:
    """``id`` of the edit's rows and gate -> their vectors ``[k, H]``."""
    found = {id(rows): rows.vectors for rows in edit.rows.values()}
    return found if edit.gate is None else {**found, id(edit.gate): edit.gate.unit[None]}


def who(held: Iterable[Held]) -> str:
    """The names of several plans, for a sentence."""
    return repr("+".join(dict.fromkeys(one.plan.name for one in held)))


def _mode(site: Site, here: Sequence[Meeting]) -> int:
    """:class:`Mode` of a combination at one site; a step that only reads has no say in it."""
    keep = {step.keep_norm for _, step, _ in here if any(edit.kind != "probe" for edit in step.edits)}
    if len(keep) > 1:
        names = who(meeting.held for meeting in here)
        raise PlanError(f"{site}: plans {names} meet on one row, and only some of them keep its norm")
    if len({id(step.controller) for _, step, _ in here if step.controller is not None}) > 1:
        names = who(meeting.held for meeting in here)
        raise PlanError(f"{site}: plans {names} meet on one row, and each brings a controller of its own")
    return int(Mode.KEEP_NORM) if keep == {True} else 0


_FLAGS = dict.fromkeys(KINDS, Flag.READ | Flag.WRITE) | {
    "add": Flag.WRITE,
    "rotate": Flag.READ | Flag.WRITE | Flag.PAIR,
    "probe": Flag.READ,
}


def _pack_edit(
    packed: Packed, start: int, edit: Edit, rows: Rows, bank: dict[int, list[int]], scale: float, gained: bool
) -> None:
    """Append the entries of an edit to a span that begins at ``start``; mates and gates count from there."""
    flags = _FLAGS[edit.kind]
    if gained:
        flags |= Flag.GAINED
    gate, lo, hi = -1, 0.0, 0.0
    if edit.gate is not None:
        gate, lo, hi = len(packed.links) - start, edit.gate.lo, edit.gate.hi
        if edit.gate.cosine:
            flags |= Flag.COSINE
        packed.links.append([bank[id(edit.gate)][0], -1, -1, int(Flag.READ)])
        packed.fields.append([0.0, 0.0, -math.inf, math.inf, 1.0, 0.0, 0.0])
    first = len(packed.links) - start
    for i, row in enumerate(bank[id(rows)]):
        mate = first + 1 - i if edit.kind == "rotate" else -1
        packed.links.append([row, mate, gate, int(flags)])
        packed.fields.append([rows.alpha[i], rows.beta[i], rows.lo[i], rows.hi[i], scale, lo, hi])
