"""Batches: sequences that run together, with their prompts, their plans, and what was decided about them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Union

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..decisions import Gains, Latch
from ..errors import PlanError
from ..program import Program
from ..steps import Step, Tokens
from .events import PADDING, Events
from .prompts import Bools, Ints, Prompts

_NUMBERS = itertools.count()
Slots = NDArray[np.int32]
Decision = Union[Latch, Gains]
Timing = tuple[Tokens, tuple[Decision, ...]]
"""When a step acts: its tokens, and what has to be decided for it."""


class Owner(NamedTuple):
    """One prompt of one batch: whose gains a slot carries."""

    batch: int
    row: int


class Hit(NamedTuple):
    """One sequence's tokens that a plan writes: ``mask [S]``."""

    plan: str
    row: int
    mask: Bools


@dataclass
class Batch:
    """Sequences that start together: one call of ``generate``, or one request of a serving batch.

    ``plans`` names the plans of each prompt; None gives every prompt every plan that the program holds at the time.

    Raises:
        PlanError: as many lists of plans as there are not prompts.
    """

    program: Program
    prompts: Prompts
    plans: Sequence[tuple[str, ...]] | None = None
    label: str = ""
    """What errors call it."""
    number: int = field(default_factory=lambda: next(_NUMBERS))
    open: dict[Decision, Bools] = field(default_factory=dict)
    """Which prompts a decision lets its steps act for; none while it has not been made."""
    gains: Tensor | None = None
    """``[sites, prompts]``: what controllers gave."""
    decided: bool = False
    """Whether the prompts have been read and every decision about them made."""
    written: dict[str, int] = field(default_factory=dict)
    """Tokens that each plan wrote of a server's request, computed again ones included."""

    def __post_init__(self) -> None:
        if self.plans is not None and len(self.plans) != len(self.prompts):
            raise PlanError(f"rows name {len(self.plans)} sequences, the batch has {len(self.prompts)} prompts")
        self.events = Events()
        self._version = -1
        self._timings: list[Timing] = []
        self._groups: Ints = np.zeros(0, np.int64)  # row -> which list of plans it has
        self._steps: list[list[tuple[str, int, Step, int]]] = []  # per list of plans: plan, number, step, timing
        self._distinct: list[Step] = []
        self._each_token = False
        self._known: dict[bytes, Slots] = {}
        self._settled: tuple[int, Slots, list[Hit]] | None = None  # rows, and what all generated tokens get
        self.next_index = 0
        """Cache index of the token after the last forward's."""
        self.steady = True
        """Whether all generated tokens are steered alike."""

    def assign(self, plans: Sequence[tuple[str, ...]] | None) -> None:
        """Give the prompts other plans, from the next forward on; ``None`` gives each every plan."""
        self.plans, self._version = plans, -1

    @property
    def names(self) -> set[str]:
        """The plans that prompts have by name."""
        return {name for names in self.plans or () for name in names}

    def steps(self) -> list[Step]:
        """The steps of every plan that some prompt has."""
        self._refresh()
        return self._distinct

    @property
    def each_token(self) -> bool:
        """Whether a controller is asked in every forward."""
        self._refresh()
        return self._each_token

    def has(self, step: Step) -> Bools:
        """Which prompts ``[B]`` have a step among those of their plans."""
        self._refresh()
        having = [any(one is step for _, _, one, _ in group) for group in self._steps]
        return np.array(having, bool)[self._groups]

    def owner(self, row: int) -> Owner:
        """Who carries the gains of prompt number ``row``."""
        return Owner(self.number, row)

    @property
    def owners(self) -> list[Owner]:
        """The owners of all prompts, in order."""
        return [self.owner(row) for row in range(len(self.prompts))]

    @property
    def watches(self) -> bool:
        """Whether some scope waits for a marker."""
        self._refresh()
        return bool(self.events.markers)

    def see(self, past: int, ids: Ints) -> None:
        """Take in token ids ``[rows, S]`` from cache index ``past`` on; padding holds no marker."""
        prompts = self.prompts.repeated(len(ids) // len(self.prompts))
        index = np.arange(past, past + ids.shape[1])
        real = (index >= prompts.length) | ((prompts.start[:, None] <= index) & (index < prompts.stop[:, None]))
        self.events.see(past, np.where(real, ids, PADDING))

    def slots(self, rows: int, past: int, tokens: int) -> tuple[Slots, list[Hit]]:
        """``[rows, tokens]``: the slot of each token of a forward after ``past`` cached ones, and what plans write.

        ``rows`` is a multiple of the prompts: beams and returned sequences.

        Raises:
            PlanError: another number of rows, a position that a prompt does not have, or a full table.
        """
        self._refresh()
        decode = tokens == 1 and past >= self.prompts.length
        if decode and self._settled is not None and self._settled[0] == rows:
            return self._settled[1:]
        if rows % len(self.prompts):
            raise PlanError(f"a forward of {rows} sequences inside a request of {len(self.prompts)} prompts")
        times = rows // len(self.prompts)
        codes = self._codes(rows, times, np.arange(past, past + tokens))
        key = codes.tobytes() if tokens == 1 else b""
        slots = self._known.get(key) if key else None
        if slots is None:
            slots = self._look_up(codes, times)
            if key:
                self._known[key] = slots
        hits = self._hits(codes, times)
        if decode and self.steady and self.decided:
            self._settled = rows, slots, hits
        return slots, hits

    def _refresh(self) -> None:
        """Group prompts by their plans, and steps by when they act, again after the program changed."""
        if self._version == self.program.version:
            return
        self._version, self._known, self._settled = self.program.version, {}, None
        everyone = tuple(plan.name for plan in self.program.plans)
        lists: dict[tuple[str, ...], int] = {}
        wanted = self.plans if self.plans is not None else [everyone] * len(self.prompts)
        self._groups = np.array([lists.setdefault(tuple(names), len(lists)) for names in wanted], np.int64)
        timings: dict[Timing, int] = {}
        self._steps = []
        for names in lists:
            group = []
            for name in names:
                for i, step in enumerate(self.program.get(name).plan.steps):
                    group.append((name, i, step, timings.setdefault((step.tokens, step.decisions), len(timings))))
            self._steps.append(group)
        self._distinct = list({id(step): step for group in self._steps for _, _, step, _ in group}.values())
        self._each_token = any(step.each_token for step in self._distinct)
        self._timings = list(timings)
        self.steady = all(tokens.steady for tokens, _ in self._timings)
        markers = {marker for tokens, _ in self._timings for marker in tokens.markers}
        if markers - set(self.events.markers):
            self.events = self.events.watching(tuple(markers))

    def _codes(self, rows: int, times: int, index: Ints) -> Ints:
        """``[rows, S]``: one bit for each timing that lets a token in."""
        codes = np.zeros((rows, len(index)), np.int64 if len(self._timings) < 63 else object)
        prompts = self.prompts.repeated(times)
        for i, (tokens, decisions) in enumerate(self._timings):
            mask = prompts.select(tokens, index, self.events)
            for decision in decisions:
                acts = self.open.get(decision)
                mask = mask & (False if acts is None else np.repeat(acts, times)[:, None])
            codes[mask] += 1 << i
        return codes

    def _look_up(self, codes: Ints, times: int) -> Slots:
        slots = np.full(codes.shape, -1, np.int32)
        groups = np.repeat(self._groups, times)
        for group, steps in enumerate(self._steps):
            mine = groups == group
            for code in _different(codes[mine]):
                chosen = [(name, i, step) for name, i, step, at in steps if code >> at & 1]
                key = [(name, i) for name, i, _ in chosen]
                here = mine[:, None] & (codes == code)
                if not any(step.controller is not None for _, _, step in chosen):
                    slots[here] = self.program.slot(key)
                    continue
                for row in np.flatnonzero(here.any(1)):
                    slots[row, here[row]] = self.program.slot(key, self.owner(int(row) // times))
        return slots

    def _hits(self, codes: Ints, times: int) -> list[Hit]:
        bits: list[list[tuple[str, int]]] = []
        for steps in self._steps:
            per_plan: dict[str, int] = {}
            for name, _, _, at in steps:
                per_plan[name] = per_plan.get(name, 0) | 1 << at
            bits.append(list(per_plan.items()))
        hits = []
        for row, group in enumerate(np.repeat(self._groups, times).tolist()):
            for name, wanted in bits[group]:
                mask = (codes[row] & wanted) != 0
                if mask.any():
                    hits.append(Hit(name, row, mask))
        return hits


def _different(codes: Ints) -> list[int]:
    """The codes other than 0 that occur."""
    if codes.size == 0:
        return []
    if (codes == codes.flat[0]).all():
        return [int(codes.flat[0])] if codes.flat[0] else []
    return sorted(set(np.unique(codes).tolist()) - {0})
