"""One worker's part: the program of plans, the requests it holds, and the row map of each forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...decisions import Read
from ...errors import PlanError
from ...ops import dispatch
from ...plan import Plan
from ...program import Capacity, Program, Site
from ...runtime.batch import Batch
from ...runtime.prompts import Prompts
from ...runtime.rows import Part, RowMap
from ...runtime.verdicts import Reading, Verdicts
from .anatomy import Anatomy
from .asked import Ticket, Variant
from .library import COMBINATIONS, check_servable, variant
from .norms import put, stand_in
from .reads import Reads
from .settings import Settings

RECEIPTS = 4096
"""Receipts kept of requests that ended."""


@dataclass
class Held:
    """A request of this worker."""

    batch: Batch
    ticket: Ticket
    names: tuple[str, ...]
    """Of its plans in the program."""


@dataclass
class Copies:
    """A plan as some requests have it, in the program under a name of its own."""

    name: str
    requests: int = 0


@dataclass
class Counts:
    """What a worker did so far."""

    rows: int = 0
    """Rows that some plan wrote."""
    requests: int = 0
    """Steered requests that arrived."""
    receipts: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)


class Steering:
    """Steers the part of a model that one worker runs.

    Args:
        settings: of the engine.
        anatomy: of this part.
        plans: to hold from the start.
        tokens: most rows of a forward.
        requests: most requests of a forward.

    Raises:
        PlanError: a plan that does not fit the model, or writes where there is no site.
    """

    def __init__(
        self,
        settings: Settings,
        anatomy: Anatomy,
        plans: Iterable[Plan],
        *,
        tokens: int,
        requests: int,
        device: torch.device,
        dtype: torch.dtype,
        ranks: int = 1,
        backend: str | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.ranks = ranks
        """Pipeline ranks that share the model."""
        capacity = Capacity(
            COMBINATIONS * requests + 1, settings.max_entries * requests, settings.max_plans * (anatomy.layers + 1)
        )
        self.program = Program(anatomy.all_sites, anatomy.width, device, capacity)
        self.rows = RowMap(self.program, tokens)
        self.verdicts = Verdicts(self.program)
        self.plans: dict[str, Plan] = {}
        """By digest."""
        self.requests: dict[str, Held] = {}
        self.counts = Counts()
        self.backend = dispatch.resolve(backend, device, dtype)
        several = list(plans)
        wanted = self._wanted(settings, several)
        self.sites = tuple(site for site in anatomy.sites if self.program.number(*site) in wanted)
        """Those that the op stands at, so the only ones that plans may write."""
        read = sorted(self.program.number(r.layer, r.site) for plan in several for r in _reads(plan))
        self.reads = Reads(dict.fromkeys(read), requests, anatomy.width, dtype, device)
        self._copies: dict[Variant, Copies] = {}
        self._idle: OrderedDict[Variant, None] = OrderedDict()
        self._most_idle = 4 * requests
        self._numbers = 0
        self._pending: dict[int, Held] = {}  # place among the states that the last forward kept -> request
        self._plain = Batch(self.program, Prompts.of(1, 1, None), [()], "a plain request", decided=True)
        for plan in several:
            self.load(plan)

    def install(self) -> None:
        """Put the op into the norms of the sites."""
        for site in self.sites:
            spec, number = self.anatomy.sites[site], self.program.number(*site)
            put(spec.module, stand_in(spec, self.program, number, self.rows, self.backend, self.reads))

    def _wanted(self, settings: Settings, plans: Sequence[Plan]) -> set[int]:
        """Numbers of the sites to put the op into."""
        wanted: set[int] = set()
        for plan in plans:
            self.program.check(plan)
            wanted |= {n for step in plan.steps for n in self.program.reach(step)}
            wanted |= {self.program.number(r.layer, r.site) for r in _reads(plan)}
        if settings.sites == "all":
            streams = [site for site in self.anatomy.sites if site.name != "resid_mid"]
            wanted |= {self.program.number(*site) for site in streams}
        return wanted

    # plans

    def load(self, plan: Plan) -> None:
        """Hold a plan; requests name it by its digest.

        Raises:
            PlanError: another width, a layer or site that is not steered here, or a full bank.
        """
        if plan.digest in self.plans:
            return
        check_servable(plan)
        self.program.check(plan)
        for step in plan.steps:
            for number in self.program.reach(step):
                self._check_site(plan, self.program.sites[number])
        for read in _reads(plan):
            if self.program.number(read.layer, read.site) not in self.reads.states:
                raise PlanError(
                    f"plan {plan.name!r} decides from {read}, which this server does not read; "
                    "name the plan in steerkern.plans when the server starts"
                )
            if self.ranks > 1:
                raise PlanError(f"plan {plan.name!r} decides from the prompt, which pipeline ranks do not share")
        self.program.add(plan.named(plan.digest))  # keeps its vectors in the bank
        self.plans[plan.digest] = plan

    def forget(self, digest: str) -> None:
        """Let a plan go that no request has, or will have."""
        if self.plans.pop(digest, None) is None:
            return
        self.program.remove(digest)
        for one in [one for one in self._idle if one.digest == digest]:
            self._drop(one)

    def _check_site(self, plan: Plan, site: Site) -> None:
        if site.layer not in self.anatomy.local or site in self.sites:
            return
        reason = self.anatomy.refused.get(site) or "the op is not installed there; start the server with sites 'all'"
        raise PlanError(f"{site}: {reason}, plan {plan.name!r}")

    # requests

    def arrive(self, name: str, ticket: Ticket) -> None:
        """A steered request comes to this worker, or comes back after it was put off."""
        if name in self.requests:
            if self.requests[name].ticket == ticket:
                return
            self.leave([name])
        names = tuple(self._copy(one) for one in ticket.plans)
        batch = Batch(self.program, Prompts.of(1, ticket.prompt, None), [names], f"request {name!r}")
        batch.decided = not any(step.decisions for step in batch.steps())
        self.requests[name] = Held(batch, ticket, names)
        self.counts.requests += 1

    def leave(self, names: Iterable[str]) -> None:
        """Requests end."""
        for name in names:
            held = self.requests.pop(name, None)
            if held is None:
                continue
            self.rows.forget()
            self._receipt(held)
            self._pending = {i: one for i, one in self._pending.items() if one is not held}
            self.verdicts.drop(held.batch)
            for one in held.ticket.plans:
                copies = self._copies[one]
                copies.requests -= 1
                if not copies.requests:
                    self._idle[one] = None
        while len(self._idle) > self._most_idle:
            self._drop(next(iter(self._idle)))

    def _copy(self, one: Variant) -> str:
        """The name of a plan as a request has it, in the program."""
        copies = self._copies.get(one)
        if copies is None:
            if one.digest not in self.plans:
                raise PlanError(f"no plan with digest {one.digest[:12]} is loaded in this worker")
            self._numbers += 1
            copies = self._copies[one] = Copies(f"copy {self._numbers}")
            self.program.add(variant(self.plans[one.digest], one.scale, one.scope, copies.name))
        copies.requests += 1
        self._idle.pop(one, None)
        return copies.name

    def _drop(self, one: Variant) -> None:
        del self._idle[one]
        name = self._copies.pop(one).name
        self.program.remove(name)
        self.rows.forget()
        written = self.rows.written.pop(name, None)
        self.counts.rows += 0 if written is None else written.tokens

    def _receipt(self, held: Held) -> None:
        if not held.ticket.receipt:
            return
        receipts = self.counts.receipts
        plans = receipts.setdefault(held.ticket.receipt, {"plans": {}})["plans"]
        for one, copy in zip(held.ticket.plans, held.names, strict=True):
            plan = self.plans.get(one.digest)
            own = plans.setdefault(plan.name if plan else one.digest, {"scale": one.scale, "tokens": 0, "sites": []})
            own["tokens"] += held.batch.written.pop(copy, 0)
            numbers = {n for step in self.program.get(copy).plan.steps for n in self.program.reach(step)}
            own["sites"] = [str(site) for site in self.sites if self.program.number(*site) in numbers]
        while len(receipts) > RECEIPTS:
            receipts.popitem(last=False)

    # a forward

    def forward(self, names: Sequence[str], past: Sequence[int], tokens: Sequence[int]) -> None:
        """Fill the row map for a forward of ``tokens[i]`` rows of request ``names[i]``, after ``past[i]`` cached."""
        self._decide()
        if not self.requests:
            self.rows.finish()
            self.rows.trim(0)
            return
        parts: list[Part] = []
        wanted: list[int] = []
        at = 0
        for name, start, count in zip(names, past, tokens, strict=True):
            held = self.requests.get(name)
            batch = self._plain if held is None else held.batch
            parts.append(Part(batch, 1, start, count))
            if held is not None and not batch.decided and start + count >= held.ticket.prompt:
                self._pending[len(wanted)] = held
                wanted.append(at + held.ticket.prompt - 1 - start)
            at += count
        self.reads.want(wanted)
        self.rows.advance(parts)
        self.rows.trim(at)

    def _decide(self) -> None:
        """Decide about the requests whose prompts ended in the last forward: it has kept their states."""
        for i, held in self._pending.items():
            reading = Reading(held.batch)
            for read in {read for step in held.batch.steps() for d in step.decisions for read in d.reads}:
                state = self.reads.states[self.program.number(read.layer, read.site)][i : i + 1]
                reading.take(read, torch.zeros(1, dtype=torch.long), state)
            self.verdicts.decide(held.batch, reading)
            self.rows.forget()
        self._pending = {}

    # what was done

    def summary(self) -> Mapping[str, int]:
        """Counts for metrics."""
        self.rows.forget()
        rows = self.counts.rows + sum(written.tokens for written in self.rows.written.values())
        return {"rows": rows, "requests": self.counts.requests, "plans": len(self.plans)}

    def receipt(self, name: str) -> dict[str, Any] | None:
        """What was written of the requests of one receipt, so far."""
        self.rows.forget()
        for held in self.requests.values():
            if held.ticket.receipt == name:
                self._receipt(held)
        return self.counts.receipts.get(name)


def _reads(plan: Plan) -> set[Read]:
    return {read for step in plan.steps for decision in step.decisions for read in decision.reads}
