"""Programs: plans packed into device tables of fixed capacity and address, changed while the model runs.

A *slot* is one combination of plan steps, as one row of a forward sees them. The kernels read, per site, the slot's
span of entries; a step that does not reach a site has none there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .edits import Edit
from .errors import PlanError
from .ops.schemas import MAX_ENTRIES, Field, Flag, Link, Mode, Tables
from .plan import Plan
from .steps import Step


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
    bank_rows: dict[int, int]
    """Address of a vector of the plan -> bank row."""
    scale: float = 1.0


class Program:
    """Plans for ``sites`` of a model of width ``H``, packed to tables on ``device``.

    Args:
        sites: the model's sites, in the order in which ``tables(i)`` numbers them.
        width: ``H``.
        device: where the tables live.
        capacity: fixed sizes; a full table raises :class:`PlanError` and changes nothing.
    """

    def __init__(
        self, sites: Sequence[Site], width: int, device: torch.device | str = "cpu", capacity: Capacity = Capacity()
    ) -> None:
        self.sites = tuple(sites)
        self.width = width
        self.capacity = capacity
        count = len(self.sites)
        self._host_bank = torch.zeros(capacity.rows, width)
        self._host_links = torch.zeros(len(Link), capacity.entries, dtype=torch.int32)
        self._host_fields = torch.zeros(len(Field), capacity.entries)
        self._host_span = torch.zeros(count, capacity.slots, 3, dtype=torch.int32)
        host = (self._host_bank, self._host_links, self._host_fields, self._host_span)
        self.device = torch.device(device)
        self._bank, self._links, self._fields, self._span = (t.to(self.device) for t in host)
        self.gain = torch.ones(count, capacity.slots, device=self.device)
        """``[sites, S]`` float32: what a controller writes."""
        self._held: dict[str, Held] = {}
        self._slots: dict[frozenset[StepKey], int] = {}
        self._free_slots = list(range(capacity.slots - 1, -1, -1))
        self._free_rows = list(range(capacity.rows - 1, -1, -1))
        self._used = np.zeros(capacity.entries, dtype=bool)
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
        named = step.layers
        if named is None:
            own = [set(e.layers) for e in step.edits if e.layers is not None]
            if own:
                named = tuple(sorted(set.intersection(*own)))
                if not named:
                    raise PlanError("the edits of one step have no layer in common")
        if named is None:
            layers = 1 + max(site.layer for site in self.sites)
            named = tuple(range(layers))
        return tuple(self._number(layer, step.site) for layer in named)

    def _number(self, layer: int, name: str) -> int:
        # resid_post[l] is the tensor resid_pre[l + 1]; only the last block's output is a site of its own
        wanted = Site(layer, name)
        if wanted not in self.sites and name == "resid_post":
            wanted = Site(layer + 1, "resid_pre")
        if wanted in self.sites:
            return self.sites.index(wanted)
        layers = 1 + max(site.layer for site in self.sites)
        if layer >= layers:
            raise PlanError(f"layer {layer}: the model has {layers} decoder layers (0..{layers - 1})")
        known = sorted({site.name for site in self.sites})
        raise PlanError(f"{Site(layer, name)}: this block has no such site; found are {', '.join(known)}")

    def check(self, plan: Plan) -> None:
        """Raise PlanError if the plan does not fit this model, before anything is changed."""
        if plan.width != self.width:
            raise PlanError(f"plan {plan.name!r} has width {plan.width}, the model has {self.width}")
        for step in plan.steps:
            try:
                self.reach(step)
            except PlanError as error:
                raise PlanError(f"{error}, plan {plan.name!r}") from None

    def add(self, plan: Plan) -> None:
        """Hold ``plan`` under its name and put its directions into the bank.

        Raises:
            PlanError: the name is taken, the plan does not fit the model, or the bank is full.
        """
        if plan.name in self._held:
            raise PlanError(f"plan {plan.name!r} is in this session already; remove it first or name the new one otherwise")
        self.check(plan)
        vectors = _distinct(vector for step in plan.steps for edit in step.edits for vector in _vectors(edit))
        if len(vectors) > len(self._free_rows):
            raise PlanError(
                f"plan {plan.name!r} needs {len(vectors)} bank rows, {len(self._free_rows)} of {self.capacity.rows} are free"
            )
        rows = {}
        for key, vector in vectors.items():
            rows[key] = row = self._free_rows.pop()
            self._host_bank[row] = vector
            self._bank[row].copy_(vector)
        self._held[plan.name] = Held(plan, rows)

    def remove(self, name: str) -> None:
        """Forget a plan, its slots and its bank rows."""
        held = self.get(name)
        for key in [key for key in self._slots if any(plan == name for plan, _ in key)]:
            self._release(key)
        self._free_rows.extend(held.bank_rows.values())
        del self._held[name]
        self._update_entries_per_row()

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply everything the plan adds to a row by ``scale`` (1 is the plan as written), from now on."""
        held = self.get(name)
        if not np.isfinite(scale):
            raise PlanError(f"scale of plan {name!r} must be finite, got {scale}")
        held.scale = float(scale)
        for key, slot in self._slots.items():
            if any(plan == name for plan, _ in key):
                self._write_fields(key, slot)

    def slot(self, steps: Iterable[StepKey]) -> int:
        """The slot of a combination of steps, made on first use; -1 for no step.

        Raises:
            PlanError: an unknown plan, more than 64 entries on a row, steps that disagree on ``keep_norm``, or a full table.
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
        order = list(self._held)
        for name, _ in key:
            self.get(name)
        ordered = sorted(key, key=lambda k: (order.index(k[0]), k[1]))
        return [(self._held[name], self._held[name].plan.steps[i]) for name, i in ordered]

    def _allocate(self, key: frozenset[StepKey]) -> None:
        steps = self._steps(key)
        who = "+".join(dict.fromkeys(held.plan.name for held, _ in steps))
        if not self._free_slots:
            raise PlanError(f"plan {who!r} needs a slot, all {self.capacity.slots} are taken")
        at_site: dict[int, list[tuple[Held, Step]]] = {}
        for held, step in steps:
            for site in self.reach(step):
                at_site.setdefault(site, []).append((held, step))
        packed = {site: _pack(self.sites[site], here, who) for site, here in at_site.items()}
        sizes = {site: links.shape[1] for site, (links, _, _) in packed.items()}
        starts = self._find(sizes, who)
        slot = self._free_slots.pop()
        for site, (links, fields, mode) in packed.items():
            first, size = starts[site], sizes[site]
            self._used[first : first + size] = True
            self._host_links[:, first : first + size] = links
            self._host_fields[:, first : first + size] = fields
            self._links[:, first : first + size].copy_(links)
            self._fields[:, first : first + size].copy_(fields)
            self._host_span[site, slot] = torch.tensor([first, size, mode], dtype=torch.int32)
        self._span[:, slot].copy_(self._host_span[:, slot])
        self.gain[:, slot] = 1.0
        self._slots[key] = slot
        self._update_entries_per_row()

    def _find(self, sizes: dict[int, int], who: str) -> dict[int, int]:
        """First free run of entries for every site of a slot, before any is taken."""
        used, starts = self._used.copy(), {}
        for site, size in sizes.items():
            free = np.flatnonzero(np.convolve(~used, np.ones(size, dtype=np.int64), "valid") == size)
            if free.size == 0:
                raise PlanError(
                    f"plan {who!r} needs {sum(sizes.values())} entries in a row, "
                    f"{int((~self._used).sum())} of {self.capacity.entries} are free"
                )
            starts[site] = int(free[0])
            used[starts[site] : starts[site] + size] = True
        return starts

    def _write_fields(self, key: frozenset[StepKey], slot: int) -> None:
        steps = self._steps(key)
        for site, (first, size, _) in enumerate(self._host_span[:, slot].tolist()):
            if size:
                here = [(held, step) for held, step in steps if site in self.reach(step)]
                _, fields, _ = _pack(self.sites[site], here, "")
                self._host_fields[:, first : first + size] = fields
                self._fields[:, first : first + size].copy_(fields)

    def _release(self, key: frozenset[StepKey]) -> None:
        slot = self._slots.pop(key)
        for first, size, _ in self._host_span[:, slot].tolist():
            self._used[first : first + size] = False
        self._host_span[:, slot] = 0
        self._span[:, slot] = 0
        self._free_slots.append(slot)

    def _update_entries_per_row(self) -> None:
        self.entries_per_row = int(self._host_span[:, :, 1].max()) if self._host_span.numel() else 0


def needs(plans: Iterable[Plan], sites: Sequence[Site]) -> Capacity:
    """A capacity with room for ``plans`` four times over, so that more can be added while the model runs."""
    steps = [step for plan in plans for step in plan.steps]
    rows = sum(len(_distinct(v for edit in step.edits for v in _vectors(edit))) for step in steps)
    entries = sum(sum(_entries(edit) for edit in step.edits) for step in steps) * len(sites)
    floor = Capacity()
    return Capacity(floor.slots, max(floor.entries, 4 * entries), max(floor.rows, 4 * rows))


def _entries(edit: Edit) -> int:
    return edit.rank + (edit.gate is not None)


def _vectors(edit: Edit) -> list[Tensor]:
    gate = [] if edit.gate is None else [edit.gate.unit]
    return [vector for rows in edit.rows.values() for vector in rows.vectors] + gate


def _distinct(vectors: Iterable[Tensor]) -> dict[int, Tensor]:
    return {vector.data_ptr(): vector for vector in vectors}


def _pack(site: Site, steps: list[tuple[Held, Step]], who: str) -> tuple[Tensor, Tensor, int]:
    """``links [4, k]``, ``fields [7, k]`` and the mode of one slot at one site."""
    keep = {step.keep_norm for _, step in steps}
    if len(keep) > 1:
        raise PlanError(f"{site}: plans {who!r} meet on one row, and only some of them keep its norm")
    links: list[list[int]] = []
    fields: list[list[float]] = []
    for held, step in steps:
        scale = step.scale * held.scale
        for edit in step.edits:
            # resid_post[l] may stand at site resid_pre[l + 1]: vectors keep the layer number the plan uses
            layer = site.layer - 1 if step.site == "resid_post" and site.name == "resid_pre" else site.layer
            rows = edit.rows[None] if None in edit.rows else edit.rows[layer]
            gate, lo, hi = -1, 0.0, 0.0
            flags = Flag.WRITE if edit.kind != "probe" else Flag(0)
            if edit.kind != "add":
                flags |= Flag.READ
            if edit.gate is not None:
                gate, lo, hi = len(links), edit.gate.lo, edit.gate.hi
                flags |= Flag.COSINE if edit.gate.cosine else Flag(0)
                links.append([held.bank_rows[edit.gate.unit.data_ptr()], -1, -1, int(Flag.READ)])
                fields.append([0.0, 0.0, -np.inf, np.inf, 1.0, 0.0, 0.0])
            first = len(links)
            for i, vector in enumerate(rows.vectors):
                mate = -1
                if edit.kind == "rotate":
                    mate, flags = first + 1 - i, flags | Flag.PAIR
                links.append([held.bank_rows[vector.data_ptr()], mate, gate, int(flags)])
                fields.append([rows.alpha[i], rows.beta[i], rows.lo[i], rows.hi[i], scale, lo, hi])
    if len(links) > MAX_ENTRIES:
        raise PlanError(f"{site}: plans {who!r} put {len(links)} entries on one row, allowed are {MAX_ENTRIES}")
    mode = int(Mode.KEEP_NORM) if keep == {True} else 0
    return torch.tensor(links, dtype=torch.int32).T.contiguous(), torch.tensor(fields).T.contiguous(), mode
