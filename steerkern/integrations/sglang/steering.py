"""One model runner, steered: the op in its norms, and before each forward the row map that the op reads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...packing import Site, vectors
from ...plan import Plan
from ...program import Capacity, Program
from ...runtime.batch import Batch
from ...runtime.prompts import Prompts
from ...runtime.rows import Part, RowMap
from .norms import FusedNorm, examine, recognise_norm, tensors
from .plans import Plans, Variant

AT_ONCE = 64
"""Variants (plan, scale, scope) that unfinished requests may ask for at a time."""


@dataclass
class Request:
    """What is kept of one request: what it asks for, and its prompt as a batch of one."""

    variant: Variant
    prompt: int
    label: str
    batch: Batch | None = None

    def batch_in(self, program: Program) -> Batch:
        """The batch, made when the request first runs."""
        if self.batch is None:
            plans = [(self.variant.plan.name,)]
            self.batch = Batch(program, Prompts.of(1, self.prompt, None), plans, self.label)
        return self.batch


class Asked:
    """The variants that requests ask for, as long as these are not finished."""

    def __init__(self) -> None:
        self._by_name: dict[str, weakref.WeakSet[Any]] = {}

    def take(self, variant: Variant, req: Any) -> None:
        """Count a request in.

        Raises:
            PlanError: there are too many other variants.
        """
        name = variant.plan.name
        if name not in self._by_name:
            self._by_name = {n: reqs for n, reqs in self._by_name.items() if any(not r.finished() for r in reqs)}
        if name not in self._by_name and len(self._by_name) >= AT_ONCE:
            raise PlanError(f"{AT_ONCE} other combinations of plan, scale and scope are running; try again later")
        self._by_name.setdefault(name, weakref.WeakSet()).add(req)


class Steering:
    """The op in those norms of ``model`` that plans write, for forwards of at most ``max_tokens`` rows with padding.

    The tables and the row map keep their addresses, so a graph that is captured afterwards steers by what they hold
    when it is replayed.

    Raises:
        PlanError: a model of another make, or a plan that does not fit it. Nothing was changed then.
    """

    def __init__(self, model: nn.Module, plans: Plans, max_tokens: int) -> None:
        anatomy = examine(model)
        declared = tuple(plans.by_name.values())
        self.program = Program(anatomy.sites, anatomy.width, anatomy.device, _capacity(declared, anatomy.sites))
        reached: set[int] = set()
        for plan in declared:  # what would fail in a forward fails now
            self.program.add(plan)
            self.program.check_meeting((plan.name, i) for i in range(len(plan.steps)))
            reached.update(number for step in plan.steps for number in self.program.reach(step))
            self.program.remove(plan.name)
        self.rows = RowMap(self.program, max_tokens)
        self._plain = Batch(self.program, Prompts.of(1, 1, None), [()], "plain requests")
        self.norms = [
            FusedNorm(site, recognise_norm(site, anatomy.norms[site]), self.program.tables(number), self.rows)
            for number, site in enumerate(anatomy.sites)
            if number in reached and site in anatomy.norms
        ]
        self._handles = self._watch(anatomy.blocks)
        for norm in self.norms:
            norm.spec.module.forward = norm.forward

    def detach(self) -> None:
        """Give the norms their own ``forward`` back."""
        self._unwatch()
        for norm in self.norms:
            del norm.spec.module.forward

    def fill(self, parts: Sequence[tuple[Request | None, int, int]]) -> None:
        """Set the row map for a forward of ``(request, past, tokens)`` in the order of its rows; -1 beyond them.

        Called on the stream of the forward, where the copies wait for the forward before and this one for them.

        Raises:
            PlanError: more rows than the map has.
        """
        count = sum(tokens for _, _, tokens in parts)
        if count > self.rows.slot.numel():
            raise PlanError(f"a forward of {count} rows, the row map has {self.rows.slot.numel()}")
        wanted = {request.variant.plan.name: request.variant.plan for request, _, _ in parts if request is not None}
        if wanted:
            self._hold(wanted)
            self.rows.advance([Part(self._batch(request), 1, past, n) for request, past, n in parts])
        else:
            self.rows.forget()
            count = 0
        self.rows.trim(count)

    def review(self, *, replayed: bool) -> None:
        """Look back at a forward.

        Raises:
            PlanError: a norm was not called since this was attached: SGLang went past it.
        """
        missed = [norm.site for norm in self.norms if not norm.called]
        if missed:
            how = "replays a graph captured without it" if replayed else "fuses it into another kernel"
            raise PlanError(f"{missed[0]}: the norm was not called, SGLang {how}; steering there would do nothing")
        if self._handles:
            self._unwatch()

    def _batch(self, request: Request | None) -> Batch:
        return self._plain if request is None else request.batch_in(self.program)

    def _hold(self, wanted: dict[str, Plan]) -> None:
        """Have the program hold these plans, in place of others where it is full."""
        missing = [plan for name, plan in wanted.items() if name not in self.program]
        room = 2 * AT_ONCE - len(self.program.plans)
        idle = [plan.name for plan in self.program.plans if plan.name not in wanted]
        for name in idle[: max(0, len(missing) - room)]:
            self.program.remove(name)
            self.rows.written.pop(name, None)
        for plan in missing:
            self.program.add(plan)

    def _watch(self, blocks: Sequence[nn.Module]) -> list[Any]:
        """Note what passes between blocks, for the norms to compare with what they are fed, in the first forward."""
        streams: list[Tensor] = []  # alive, so that no other tensor takes their place in memory
        for norm in self.norms:
            norm.streams = streams

        def note(*given: object) -> None:
            if not torch.compiler.is_compiling():
                streams[:] = tensors(given)

        entered = [
            block.register_forward_pre_hook(lambda _, *given: note(*given), with_kwargs=True) for block in blocks
        ]
        return [*entered, blocks[-1].register_forward_hook(lambda _, args, output: note(output))]

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _capacity(plans: Sequence[Plan], sites: Sequence[Site]) -> Capacity:
    """Room for twice :data:`AT_ONCE` variants of the largest plan: finished requests run on for a forward."""
    rows = entries = combinations = 1
    for plan in plans:
        edits = [edit for step in plan.steps for edit in step.edits]
        rows = max(rows, sum(len(stack) for edit in edits for stack in vectors(edit).values()))
        entries = max(entries, sum(edit.entries for edit in edits) * len(sites))
        # steps of different scopes meet in up to this many ways on a token
        combinations = max(combinations, 2 ** min(len({step.tokens for step in plan.steps}), 4) - 1)
    slots = 2 * AT_ONCE * combinations
    return Capacity(slots, slots * entries, 2 * AT_ONCE * rows)
