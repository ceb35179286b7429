"""Programs: plans packed into device tables of fixed capacity and address, changed while the model runs.

A *slot* is what a row of a forward is steered by: one combination of plan steps, and, where a controller weighs them,
one *owner*, the request whose gains the slot holds. Per site the kernels read the slot's span of entries; a step that
does not reach a site has none there. The entries of a combination stand together and are shared by its slots; what the
last of these leaves is closed at once.

Slots are taken on first use and given back when their plan or their owner goes, or when another combination needs one
and nobody used them since :meth:`Program.begin`. A slot counts its generations: what was remembered of a slot holds as
long as the generation does, so a slot that was given to somebody else is never taken for the old one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bank import Bank
from .entries import Entries
from .errors import PlanError
from .ops.schemas import Tables
from .packing import Combination, Held, Packed, Site, StepKey, pack, vectors, who
from .plan import Plan
from .steps import Step
from .vectors import finite

__all__ = ["Capacity", "Held", "Lease", "Program", "Site", "StepKey", "needs"]


class Capacity(NamedTuple):
    """How much a program can hold: slots, entries, and bank rows.

    A combination of steps takes an entry for each vector that acts at a site; sites with the same ones share them.
    """

    slots: int = 64
    entries: int = 4096
    rows: int = 256


class Lease(NamedTuple):
    """A slot and the generation for which it was given."""

    slot: int
    generation: int


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
        self._numbers: dict[tuple[int, str], int] = {}
        for number, (layer, name) in enumerate(self.sites):
            self._numbers[layer, name] = number
            if name == "resid_pre":  # only the last block's output is a site of its own
                self._numbers.setdefault((layer - 1, "resid_post"), number)
        self._layers = 1 + max((site.layer for site in self.sites), default=-1)
        self.device = torch.device(device)
        self._bank = Bank(capacity.rows, width, self.device)
        self._entries = Entries(len(self.sites), capacity.slots, capacity.entries, self.device)
        self.gain = torch.ones(len(self.sites), capacity.slots, device=self.device)
        """``[sites, S]`` float32: what a controller writes."""
        self.version = 0
        """Counts the changes after which a row map made before may name slots that mean something else."""
        self._held: dict[str, Held] = {}
        self._added = 0
        self._slots: dict[tuple[Combination, Hashable], int] = {}
        self._keys: dict[int, tuple[Combination, Hashable]] = {}
        self._gains: dict[Hashable, Tensor] = {}  # owner -> [sites]
        self._generation = [0] * capacity.slots
        self._used = [0] * capacity.slots
        self._epoch = 1
        self._free_slots = list(range(capacity.slots - 1, -1, -1))

    def tables(self, site: int) -> Tables:
        """The tables as site number ``site`` reads them; addresses never change."""
        held = self._entries
        return Tables(self._bank.table, held.links, held.fields, held.span[site], self.gain[site])

    @property
    def entries_per_row(self) -> int:
        """Most entries that any slot holds at one site."""
        return self._entries.longest

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans held, oldest first."""
        return tuple(held.plan for held in self._held.values())

    def __contains__(self, name: str) -> bool:
        return name in self._held

    # which sites a step reaches

    def places(self, step: Step) -> dict[int, int]:
        """Site number -> layer as the plan counts it: ``resid_post[l]`` may stand at the site ``resid_pre[l + 1]``.

        Raises:
            PlanError: a layer or site that the model does not have, or that the step's controller does not weigh.
        """
        named: Iterable[int] | None = step.layers
        if named is None:  # the edits of a step agree about their layers
            named = step.edits[0].layers or range(self._layers)
        found = {self.number(layer, step.site): layer for layer in named}
        if step.controller is not None and (missing := sorted(set(found.values()) - set(step.controller.layers))):
            raise PlanError(f"layer {missing[0]}: the controller weighs layers {list(step.controller.layers)}")
        return found

    def reach(self, step: Step) -> tuple[int, ...]:
        """Numbers of the sites that a step writes; PlanError as for :meth:`places`."""
        return tuple(self.places(step))

    def steers(self, site: Site) -> bool:
        """Whether some plan that is held acts at a site."""
        number = self._numbers.get(site)
        return any(number in places for held in self._held.values() for places in held.places.values())

    def number(self, layer: int, name: str) -> int:
        """The number of a site; PlanError if the model has no such one."""
        found = self._numbers.get((layer, name))
        if found is not None:
            return found
        if layer >= self._layers:
            raise PlanError(f"layer {layer}: the model has {self._layers} decoder layers (0..{self._layers - 1})")
        known = sorted({site.name for site in self.sites if site.layer == layer})
        raise PlanError(f"{Site(layer, name)}: no such site; this block has {', '.join(known) or 'none'}")

    # plans

    def check(self, plan: Plan) -> dict[Step, dict[int, int]]:
        """The :meth:`places` of each step; PlanError if the plan does not fit this model."""
        if plan.width != self.width:
            raise PlanError(f"plan {plan.name!r} has width {plan.width}, the model has {self.width}")
        places = {}
        for step in plan.steps:
            try:
                places[step] = self.places(step)
                for decision in step.decisions:
                    for read in decision.reads:
                        self.number(read.layer, read.site)
            except PlanError as error:
                raise PlanError(f"{error}, plan {plan.name!r}") from None
        return places

    def add(self, plan: Plan) -> None:
        """Hold ``plan`` under its name and put its directions into the bank.

        Raises:
            PlanError: the name is taken, the plan does not fit the model, or the bank is full.
        """
        if plan.name in self._held:
            raise PlanError(f"plan {plan.name!r} is in this session already; remove it or name the new one otherwise")
        places = self.check(plan)
        parts = {part: stack for step in plan.steps for edit in step.edits for part, stack in vectors(edit).items()}
        self._held[plan.name] = Held(plan, self._added, places, self._bank.hold(parts, plan.name))
        self._added += 1
        self.version += 1

    def remove(self, name: str) -> None:
        """Forget a plan, its slots and its bank rows; PlanError if there is none of that name."""
        held = self.get(name)
        steps = {(name, i) for i in range(len(held.plan.steps))}
        for slot in [slot for slot, (key, _) in self._keys.items() if not steps.isdisjoint(key)]:
            self._release(slot)
        self._bank.drop(held.bank_rows)
        del self._held[name]
        self.version += 1
        self._entries.upload()

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
        held.changes += number != held.scale
        held.scale = number
        steps = {(name, i) for i in range(len(held.plan.steps))}
        for key in self._entries.blocks:
            if not steps.isdisjoint(key):
                self._entries.rewrite(key, self._pack(key))
        self._entries.upload()

    def get(self, name: str) -> Held:
        """What is held under a name; PlanError if nothing is."""
        if name not in self._held:
            known = ", ".join(map(repr, self._held)) or "none"
            raise PlanError(f"no plan {name!r} in this session; known are {known}")
        return self._held[name]

    def check_meeting(self, steps: Iterable[StepKey]) -> None:
        """Raise PlanError if these steps cannot act on the same row."""
        self._pack(frozenset(steps))

    # slots

    def begin(self) -> None:
        """Start a new row map: slots that it does not ask for may be given to what it asks for."""
        self._epoch += 1

    def slot(self, steps: Iterable[StepKey], owner: Hashable = None) -> int:
        """The slot of a combination of steps, made on first use; -1 for no step.

        With an ``owner`` the slot is his alone and carries his gains.

        Raises:
            PlanError: an unknown plan, steps that cannot meet on a row, or a table that is full.
        """
        key = frozenset(steps)
        if not key:
            return -1
        slot = self._slots.get((key, owner))
        if slot is None:
            slot = self._allocate(key, owner)
        self._used[slot] = self._epoch
        return slot

    def lease(self, steps: Iterable[StepKey], owner: Hashable = None) -> Lease:
        """:meth:`slot` with the generation that says how long it means the same."""
        slot = self.slot(steps, owner)
        return Lease(slot, self._generation[slot] if slot >= 0 else 0)

    def keeps(self, lease: Lease) -> bool:
        """Whether a lease still holds; if so, its slot counts as used by the current row map."""
        slot, generation = lease
        if slot < 0:
            return True
        if self._generation[slot] != generation:
            return False
        self._used[slot] = self._epoch
        return True

    def set_gains(self, owners: Sequence[Hashable], gains: Tensor) -> None:
        """Give each owner his gains ``[sites, len(owners)]``; a device operation, without waiting for it."""
        columns = gains.to(self.gain.device, torch.float32)
        column = {owner: i for i, owner in enumerate(owners)}
        for owner, i in column.items():
            self._gains[owner] = columns[:, i]
        at = [(slot, column[owner]) for slot, (_, owner) in self._keys.items() if owner in column]
        if at:
            slots, sources = torch.tensor(at).T
            self.gain[:, slots.to(self.gain.device)] = columns[:, sources.to(columns.device)]

    def release(self, owners: Iterable[Hashable]) -> None:
        """Forget owners whose requests ended, with their slots and gains."""
        leaving = set(owners)
        for slot, (_, owner) in list(self._keys.items()):
            if owner in leaving:
                self._release(slot)
        for owner in leaving:
            self._gains.pop(owner, None)
        self._entries.upload()

    def probe_columns(self, number: int, slot: int, name: str) -> list[int]:
        """Where a plan's probes stand among the entries of a slot at site ``number``."""
        columns: list[int] = []
        at = 0
        for held, step in self._steps(self._keys[slot][0]):
            if number in held.places[step]:
                for edit in step.edits:
                    if edit.kind == "probe" and held.plan.name == name:
                        columns += range(at + (edit.gate is not None), at + edit.entries)
                    at += edit.entries
        return columns

    def _steps(self, key: Combination) -> list[tuple[Held, Step]]:
        """The steps of a slot in the order of the plans, which fixes the order of its entries."""
        keyed = sorted((self.get(name).number, i, self.get(name)) for name, i in key)
        return [(held, held.plan.steps[i]) for _, i, held in keyed]

    def _pack(self, key: Combination) -> Packed:
        return pack(self._steps(key), self.sites)

    def _allocate(self, key: Combination, owner: Hashable) -> int:
        packed = None if key in self._entries.blocks else self._pack(key)
        self._make_room(key, 0 if packed is None else len(packed.links))
        if key not in self._entries.blocks:  # never was, or went with the slot that made room
            self._entries.append(key, packed or self._pack(key))
        slot = self._free_slots.pop()
        self._entries.point(slot, key)
        self.gain[:, slot] = self._gains.get(owner, 1.0)
        self._slots[key, owner] = slot
        self._keys[slot] = key, owner
        self._generation[slot] += 1
        self._entries.upload()
        return slot

    def _make_room(self, key: Combination, size: int) -> None:
        """Release slots that nobody uses, the longest unused first, until there is one slot and room for ``size``.

        Nothing is released if that would not be enough.
        """
        room = self._entries.room
        if self._free_slots and size <= room:
            return
        idle = sorted((s for s in self._keys if self._used[s] < self._epoch), key=lambda s: self._used[s])
        unused = set(idle)
        blocks = [b for k, b in self._entries.blocks.items() if k != key and b.slots <= unused]
        names = who(one for one, _ in self._steps(key))
        if not self._free_slots and not idle:
            raise PlanError(f"plans {names} need a slot, all {self.capacity.slots} are taken")
        if size > room + sum(b.size for b in blocks):
            raise PlanError(f"plans {names} need {size} entries, {room} of {self.capacity.entries} are free")
        while not self._free_slots or size > self._entries.room:
            slot = next(s for s in idle if s in self._keys and (self._keys[s][0] != key or not self._free_slots))
            self._release(slot)

    def _release(self, slot: int) -> None:
        """Give a slot back."""
        key, owner = self._keys.pop(slot)
        del self._slots[key, owner]
        self._entries.clear(slot, key)
        self._generation[slot] += 1
        self._free_slots.append(slot)
        self.version += 1


def needs(plans: Iterable[Plan], sites: Sequence[Site]) -> Capacity:
    """A capacity with room for ``plans`` four times over, so that more can be added while the model runs."""
    several = list(plans)
    steps = [step for plan in several for step in plan.steps]
    rows = sum(len(stack) for step in steps for edit in step.edits for stack in vectors(edit).values())
    entries = sum(edit.entries for step in steps for edit in step.edits) * len(sites)
    floor = Capacity()
    # one combination per request with a controller: those of a serving batch
    slots = max(floor.slots, 4 * len(several), 256 if any(step.controller is not None for step in steps) else 0)
    return Capacity(slots, max(floor.entries, 4 * entries), max(floor.rows, 4 * rows))
