"""Programs: plans packed into device tables of fixed capacity and address, changed while the model runs.

A *slot* is one combination of plan steps, as one row of a forward sees them. The kernels read, per site, the slot's
span of entries; a step that does not reach a site has none there. The entries of a slot stand together, and those of
all slots without a gap: what a removed slot leaves is closed at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .edits import Edit, Rows
from .errors import PlanError
from .ops.schemas import MAX_ENTRIES, Field, Flag, Link, Mode, Tables
from .plan import Plan
from .steps import Step
from .vectors import finite


class Site(NamedTuple):
    """One place in the model, by block and name; ``Site(L - 1, "resid_post")`` is the final norm's input."""

    layer: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}[{self.layer}]"


class Capacity(NamedTuple):
    """How much a program can hold: slots, entries over all sites and slots, and bank rows."""

    slots: int = 64
    entries: int = 4096
    rows: int = 256


StepKey = tuple[str, int]
"""A plan's name and the number of the step in it."""


@dataclass
class Held:
    """A plan in the program."""

    plan: Plan
    bank_rows: dict[int, list[int]]
    """``id`` of a :class:`~steerkern.edits.Rows` or Gate of the plan -> bank rows of its vectors."""
    scale: float = 1.0


@dataclass
class Packed:
    """The entries of one slot over all sites, as columns of ``links`` and ``fields``."""

    links: list[list[int]] = field(default_factory=list)
    fields: list[list[float]] = field(default_factory=list)
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Site, first entry within the slot, number of entries, :class:`Mode`."""


class Program:
    """Plans for ``sites`` of a model of width ``H``, packed to tables on ``device``.

    Args:
        sites: the model's sites, in the order in which ``tables(i)`` numbers them.
        width: ``H``.
        device: where the tables live.
        capacity: fixed sizes; a full table raises :class:`PlanError` and changes nothing.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        width: int,
        device: torch.device | str = "cpu",
        capacity: Capacity | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.width = width
        self.capacity = capacity = capacity or Capacity()
        if min(capacity) < 1:
            raise ValueError(f"capacity must be at least 1 of each, got {capacity}")
        self._numbers = {site: number for number, site in enumerate(self.sites)}
        self._layers = 1 + max((site.layer for site in self.sites), default=-1)
        self.device = torch.device(device)
        self._bank = torch.zeros(capacity.rows, width, device=self.device)
        self._host_links = torch.zeros(len(Link), capacity.entries, dtype=torch.int32)
        self._host_fields = torch.zeros(len(Field), capacity.entries)
        self._host_span = torch.zeros(len(self.sites), capacity.slots, 3, dtype=torch.int32)
        host = (self._host_links, self._host_fields, self._host_span)
        self._links, self._fields, self._span = (t.to(self.device) for t in host)
        self.gain = torch.ones(len(self.sites), capacity.slots, device=self.device)
        """``[sites, S]`` float32: what a controller writes."""
        self._held: dict[str, Held] = {}
        self._slots: dict[frozenset[StepKey], int] = {}
        self._blocks: dict[int, tuple[int, int]] = {}  # slot -> first and number of its entries over all sites
        self._free_slots = list(range(capacity.slots - 1, -1, -1))
        self._free_rows = list(range(capacity.rows - 1, -1, -1))
        self._filled = 0  # entries in use: 0.._filled-1
        self.entries_per_row = 0
        """Most entries that any slot holds at one site."""

    def tables(self, site: int) -> Tables:
        """The tables as site number ``site`` reads them; addresses never change."""
        return Tables(self._bank, self._links, self._fields, self._span[site], self.gain[site])

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans held, oldest first."""
        return tuple(held.plan for held in self._held.values())

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def reach(self, step: Step) -> tuple[int, ...]:
        """Numbers of the sites that a step writes.

        Raises:
            PlanError: a layer or site that the model does not have.
        """
        return tuple(self._places(step))

    def _places(self, step: Step) -> dict[int, int]:
        """Site number -> layer as the plan counts it: ``resid_post[l]`` may stand at the site ``resid_pre[l + 1]``."""
        named: Iterable[int] | None = step.layers
        if named is None:  # the edits of a step agree about their layers
            named = step.edits[0].layers or range(self._layers)
        return {self._number(layer, step.site): layer for layer in named}

    def _number(self, layer: int, name: str) -> int:
        wanted = Site(layer, name)
        if wanted not in self._numbers and name == "resid_post":
            wanted = Site(layer + 1, "resid_pre")  # only the last block's output is a site of its own
        if wanted in self._numbers:
            return self._numbers[wanted]
        if layer >= self._layers:
            raise PlanError(f"layer {layer}: the model has {self._layers} decoder layers (0..{self._layers - 1})")
        known = sorted({site.name for site in self.sites if site.layer == layer})
        raise PlanError(f"{Site(layer, name)}: no such site; this block has {', '.join(known) or 'none'}")

    def check(self, plan: Plan) -> None:
        """Raise PlanError if the plan does not fit this model, before anything is changed."""
        if plan.width != self.width:
            raise PlanError(f"plan {plan.name!r} has width {plan.width}, the model has {self.width}")
        for step in plan.steps:
            try:
                self._places(step)
            except PlanError as error:
                raise PlanError(f"{error}, plan {plan.name!r}") from None

    def add(self, plan: Plan) -> None:
        """Hold ``plan`` under its name and put its directions into the bank.

        Raises:
            PlanError: the name is taken, the plan does not fit the model, or the bank is full.
        """
        if plan.name in self._held:
            raise PlanError(f"plan {plan.name!r} is in this session already; remove it or name the new one otherwise")
        self.check(plan)
        parts = {part: stack for step in plan.steps for edit in step.edits for part, stack in _vectors(edit).items()}
        vectors = _distinct(parts.values())
        free = len(self._free_rows)
        if len(vectors) > free:
            raise PlanError(
                f"plan {plan.name!r} needs {len(vectors)} bank rows, {free} of {self.capacity.rows} are free"
            )
        taken = {address: self._free_rows.pop() for address in vectors}
        for address, vector in vectors.items():
            self._bank[taken[address]].copy_(vector)
        rows = {part: [taken[vector.data_ptr()] for vector in stack] for part, stack in parts.items()}
        self._held[plan.name] = Held(plan, rows)

    def remove(self, name: str) -> None:
        """Forget a plan, its slots and its bank rows; PlanError if there is none of that name."""
        held = self.get(name)
        for key in [key for key in self._slots if any(plan == name for plan, _ in key)]:
            self._release(key)
        self._free_rows.extend({row for rows in held.bank_rows.values() for row in rows})
        del self._held[name]
        self._upload()

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply everything the plan adds to a row by ``scale`` (1 is the plan as written), from now on.

        Raises:
            PlanError: no such plan, or a scale that is not finite, by itself or times the scale of a step.
            TypeError: a scale that is not a number.
        """
        held = self.get(name)
        try:
            number = finite(scale, f"scale of plan {name!r}")
            for step in held.plan.steps:
                finite(step.scale * number, f"scale of plan {name!r}")
        except ValueError as error:
            raise PlanError(str(error)) from None
        held.scale = number
        for key, slot in self._slots.items():
            if any(plan == name for plan, _ in key):
                first, size = self._blocks[slot]
                self._host_fields[:, first : first + size] = torch.tensor(self._pack(key).fields).T
        self._upload()

    def slot(self, steps: Iterable[StepKey]) -> int:
        """The slot of a combination of steps, made on first use; -1 for no step.

        Raises:
            PlanError: an unknown plan, more than 64 entries on a row, steps that disagree on ``keep_norm``, or a full
                table.
        """
        key = frozenset(steps)
        if not key:
            return -1
        if key not in self._slots:
            self._allocate(key)
        return self._slots[key]

    def get(self, name: str) -> Held:
        """What is held under a name; PlanError if nothing is."""
        if name not in self._held:
            known = ", ".join(map(repr, self._held)) or "none"
            raise PlanError(f"no plan {name!r} in this session; known are {known}")
        return self._held[name]

    def _steps(self, key: frozenset[StepKey]) -> list[tuple[Held, Step]]:
        """The steps of a slot in the order of the plans, which fixes the order of its entries."""
        order = {name: i for i, name in enumerate(self._held)}
        for name, _ in key:
            self.get(name)
        ordered = sorted(key, key=lambda k: (order[k[0]], k[1]))
        return [(self._held[name], self._held[name].plan.steps[i]) for name, i in ordered]

    def _pack(self, key: frozenset[StepKey]) -> Packed:
        steps = self._steps(key)
        at_site: dict[int, list[tuple[Held, Step, int]]] = {}
        for held, step in steps:
            for number, layer in self._places(step).items():
                at_site.setdefault(number, []).append((held, step, layer))
        packed = Packed()
        for number, here in sorted(at_site.items()):
            first, mode = len(packed.links), _mode(self.sites[number], here)
            for held, step, layer in here:
                for edit in step.edits:
                    rows = edit.rows[None if None in edit.rows else layer]
                    _pack_edit(packed, first, edit, rows, held.bank_rows, step.scale * held.scale)
            size = len(packed.links) - first
            if size > MAX_ENTRIES:
                raise PlanError(
                    f"{self.sites[number]}: plans {_who(held for held, _ in steps)} put {size} entries on one row, "
                    f"allowed are {MAX_ENTRIES}"
                )
            packed.spans.append((number, first, size, mode))
        return packed

    def probe_columns(self, number: int, slot: int, name: str) -> list[int]:
        """Where a plan's probes stand among the entries of a slot at site ``number``."""
        key = next(key for key, s in self._slots.items() if s == slot)
        columns: list[int] = []
        at = 0
        for held, step in self._steps(key):
            if number in self._places(step):
                for edit in step.edits:
                    if edit.kind == "probe" and held.plan.name == name:
                        columns += range(at + (edit.gate is not None), at + edit.entries)
                    at += edit.entries
        return columns

    def _allocate(self, key: frozenset[StepKey]) -> None:
        packed = self._pack(key)
        first, size = self._filled, len(packed.links)
        who = _who(held for held, _ in self._steps(key))
        if not self._free_slots:
            raise PlanError(f"plans {who} need a slot, all {self.capacity.slots} are taken")
        free = self.capacity.entries - first
        if size > free:
            raise PlanError(f"plans {who} need {size} entries, {free} of {self.capacity.entries} are free")
        slot = self._free_slots.pop()
        self._host_links[:, first : first + size] = torch.tensor(packed.links, dtype=torch.int32).T
        self._host_fields[:, first : first + size] = torch.tensor(packed.fields).T
        numbers, starts, counts, modes = torch.tensor(packed.spans).T
        self._host_span[numbers, slot] = torch.stack([first + starts, counts, modes], 1).int()
        self.gain[:, slot] = 1.0
        self._slots[key] = slot
        self._blocks[slot] = (first, size)
        self._filled += size
        self._upload()

    def _release(self, key: frozenset[StepKey]) -> None:
        """Give a slot back and close the gap that its entries leave."""
        slot = self._slots.pop(key)
        first, size = self._blocks.pop(slot)
        for table in (self._host_links, self._host_fields):
            table[:, first : self._filled - size] = table[:, first + size : self._filled].clone()
        self._host_span[:, slot] = 0
        start = self._host_span[..., 0]
        start -= size * (start > first).int()
        self._blocks = {s: (at - size if at > first else at, n) for s, (at, n) in self._blocks.items()}
        self._filled -= size
        self._free_slots.append(slot)

    def _upload(self) -> None:
        self._links.copy_(self._host_links)
        self._fields.copy_(self._host_fields)
        self._span.copy_(self._host_span)
        self.entries_per_row = int(self._host_span[..., 1].max()) if self._host_span.numel() else 0


def needs(plans: Iterable[Plan], sites: Sequence[Site]) -> Capacity:
    """A capacity with room for ``plans`` four times over, so that more can be added while the model runs."""
    steps = [step for plan in plans for step in plan.steps]
    rows = sum(len(stack) for step in steps for edit in step.edits for stack in _vectors(edit).values())
    entries = sum(edit.entries for step in steps for edit in step.edits) * len(sites)
    floor = Capacity()
    return Capacity(floor.slots, max(floor.entries, 4 * entries), max(floor.rows, 4 * rows))


def _vectors(edit: Edit) -> dict[int, Tensor]:
    """``id`` of the edit's rows and gate -> their vectors ``[k, H]``."""
    found = {id(rows): rows.vectors for rows in edit.rows.values()}
    return found if edit.gate is None else {**found, id(edit.gate): edit.gate.unit[None]}


def _distinct(stacks: Iterable[Tensor]) -> dict[int, Tensor]:
    """Address -> vector: a vector that several edits share takes one bank row."""
    return {vector.data_ptr(): vector for stack in stacks for vector in stack}


def _who(held: Iterable[Held]) -> str:
    return repr("+".join(dict.fromkeys(one.plan.name for one in held)))


def _mode(site: Site, here: list[tuple[Held, Step, int]]) -> int:
    """:class:`Mode` of a slot at one site; a step that only reads has no say in it."""
    keep = {step.keep_norm for _, step, _ in here if any(edit.kind != "probe" for edit in step.edits)}
    if len(keep) > 1:
        who = _who(held for held, _, _ in here)
        raise PlanError(f"{site}: plans {who} meet on one row, and only some of them keep its norm")
    return int(Mode.KEEP_NORM) if keep == {True} else 0


def _pack_edit(packed: Packed, start: int, edit: Edit, rows: Rows, bank: dict[int, list[int]], scale: float) -> None:
    """Append the entries of an edit to a span that begins at ``start``; mates and gates count from there."""
    flags = Flag.WRITE if edit.kind != "probe" else Flag(0)
    if edit.kind != "add":
        flags |= Flag.READ
    if edit.kind == "rotate":
        flags |= Flag.PAIR
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
