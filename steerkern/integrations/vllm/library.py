"""The plans of a server: what can be asked for by name, and whether it can run there."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import PlanError
from ...packing import vectors
from ...plan import Plan
from ...program import Capacity, Program, Site
from ...runtime.block_names import first_by_length, first_written
from ...runtime.prompts import Prompts
from ...steps import Step
from .asked import Ticket, Variant, Wish
from .settings import PLAIN, Settings, check_scale

MAX_TIMINGS = 3
"""Different scopes of the plans of one request."""
COMBINATIONS = 2**MAX_TIMINGS - 1
"""Combinations of plans that rows of one request can have, so the slots that it may take."""


class UnknownPlan(PlanError):
    """A name under which no plan is loaded."""


@dataclass(frozen=True)
class Shelf:
    """A plan that can be asked for."""

    plan: Plan
    source: str
    scale: float = 1.0
    """Multiplies the scale of every request that arrives from now on."""


class Library:
    """Plans by name, for a model with ``layers`` blocks of width ``width``.

    All methods may be called from several threads.
    """

    def __init__(self, settings: Settings, width: int, layers: int, speculative: bool = False) -> None:
        self.settings = settings
        self.width, self.layers = width, layers
        self.speculative = speculative
        """Whether the engine guesses tokens ahead, so that a forward's positions may be taken back."""
        self.shelves: dict[str, Shelf] = {}
        self.lock = threading.RLock()
        """Held while a request is admitted, so that its plans are not let go meanwhile."""
        sites = [Site(i, name) for i in range(layers) for name in ("resid_pre", "resid_mid")]
        self._sites = (*sites, Site(layers - 1, "resid_post"))
        self._admitted = functools.lru_cache(maxsize=4096)(self._check)
        for name, source in settings.plans.items():
            self.put(self.shelf(name, Plan.from_pretrained(source), source))

    def shelf(self, name: str, plan: Plan, source: str, scale: object = 1.0) -> Shelf:
        """A plan that could be put up under a name.

        Raises:
            ValueError, TypeError: a name or scale that is none.
            PlanError: the name is taken, the library full, or the plan cannot run on this server.
        """
        factor = check_scale(scale, "scale")
        if name == PLAIN:
            raise ValueError(f"{PLAIN!r} means no plan and cannot name one")
        named = plan.named(name)
        if name in self.shelves:
            raise PlanError(f"plan {name!r} is loaded already; unload it first or name the new one otherwise")
        if len(self.shelves) >= self.settings.max_plans:
            raise PlanError(f"plan {name!r}: {len(self.shelves)} plans are loaded, max_plans allows no more")
        self._check((named,))
        return Shelf(named, source, factor)

    def put(self, shelf: Shelf) -> None:
        """Let requests to come ask for a plan."""
        with self.lock:
            self.shelves[shelf.plan.name] = shelf

    def take(self, name: str) -> Shelf:
        """Make a plan unavailable to requests to come; UnknownPlan if there is none of that name."""
        with self.lock:
            shelf = self.get(name)
            if name == self.settings.default:
                raise PlanError(f"plan {name!r} is the server's default and stays")
            return self.shelves.pop(shelf.plan.name)

    def rescale(self, name: str, scale: object) -> None:
        """Set the strength that requests from now on get; ValueError, TypeError or UnknownPlan, and nothing changed."""
        factor = check_scale(scale, "scale")
        with self.lock:
            self.shelves[name] = replace(self.get(name), scale=factor)

    def get(self, name: str) -> Shelf:
        """The plan of a name; UnknownPlan if there is none."""
        shelf = self.shelves.get(name)
        if shelf is None:
            known = ", ".join(map(repr, sorted(self.shelves))) or "none"
            raise UnknownPlan(f"no plan {name!r} is loaded; known are {known}")
        return shelf

    def ticket(self, asked: Sequence[Wish] | None, prompt: int, receipt: str = "") -> Ticket | None:
        """What a request with a prompt of ``prompt`` tokens gets; None if it runs plain.

        Raises:
            PlanError: an unknown plan, or plans that cannot act on this request or not together.
        """
        with self.lock:
            if asked is None:
                asked = [] if self.settings.default is None else [Wish(self.settings.default)]
            chosen = [(self.get(wish.name), wish) for wish in asked]
        factors = [shelf.scale * wish.scale for shelf, wish in chosen]
        held = [
            (shelf.plan, Variant(shelf.plan.digest, check_scale(factor, "scale"), wish.scope))
            for (shelf, wish), factor in zip(chosen, factors, strict=True)
            if factor
        ]
        if not held:
            return None
        plans = tuple(_acting(plan, variant.scope) for plan, variant in held)
        self._admitted(plans)
        prompts, steps = Prompts.of(1, prompt, None), [step for plan in plans for step in plan.steps]
        first = min(first_written(step, prompts) for step in steps)
        by_length = min(first_by_length(step, prompts) for step in steps)
        return Ticket(tuple(variant for _, variant in held), first, by_length, prompt, receipt)

    def _check(self, plans: tuple[Plan, ...]) -> None:
        """Raise PlanError if plans cannot run here together."""
        for plan in plans:
            check_servable(plan)
            self._check_positions(plan)
        steps = [step for plan in plans for step in plan.steps]
        rows = sum(len(stack) for step in steps for edit in step.edits for stack in vectors(edit).values())
        program = Program(self._sites, self.width, capacity=Capacity(1, 1, rows))
        for number, plan in enumerate(plans):
            program.add(plan.named(f"{number}"))
        keys = [(f"{number}", i) for number, plan in enumerate(plans) for i in range(len(plan.steps))]
        program.check_meeting(keys)
        timings = {(step.tokens, step.decisions) for step in steps}
        if len(timings) > MAX_TIMINGS:
            raise PlanError(f"the plans of a request have {len(timings)} different scopes, allowed are {MAX_TIMINGS}")
        entries = sum(edit.entries * len(program.places(step)) for step in steps for edit in step.edits)
        needed = entries * (2 ** len(timings) - 1)
        if needed > self.settings.max_entries:
            raise PlanError(f"a request needs {needed} table entries, max_entries is {self.settings.max_entries}")

    def _check_positions(self, plan: Plan) -> None:
        for step in plan.steps:
            if self.speculative and not (step.tokens.steady or step.tokens.stop == 0):
                raise PlanError(
                    f"plan {plan.name!r} counts generated tokens, whose positions speculative decoding may take back"
                )


@functools.lru_cache(maxsize=4096)
def _acting(plan: Plan, scope: str | None) -> Plan:
    return plan if scope is None else plan.scoped(scope)


def check_servable(plan: Plan) -> None:
    """Raise PlanError if a plan asks for what no forward of an engine can give."""
    for step in plan.steps:
        reason = _unservable(step)
        if reason:
            raise PlanError(f"plan {plan.name!r} {reason}")


def _unservable(step: Step) -> str:
    if any(edit.kind == "probe" for edit in step.edits):
        return "has a probe, and an engine gives no readings back"
    if step.tokens.markers:
        return "waits for token sequences, which an engine's worker does not know as they come"
    if step.each_token:
        return "asks its controller at every token; in an engine it can be asked once, at the end of the prompt"
    if step.decisions and step.tokens.writes_prompt:
        return "decides from the prompt and writes prompt tokens, which an engine reads in chunks; scope 'decode' works"
    if any(read.token != -1 for decision in step.decisions for read in decision.reads):
        return "decides from other states than the last prompt token's, which the prefix cache may skip"
    return ""


def variant(plan: Plan, scale: float, scope: str | None, name: str) -> Plan:
    """The plan as a request has it, under a name of its own; its vectors are shared."""
    return _acting(plan, scope).scaled(scale).named(name)


def inside(folder: str, path: str) -> Path:
    """``path`` within ``folder``; PermissionError if it leads out of it, also by links."""
    root = Path(folder).resolve()
    found = (root / path).resolve()
    if found != root and root not in found.parents:
        raise PermissionError(f"{path!r} is not inside the folder that plans may be loaded from")
    return found


def model_shape(vllm_config: Any) -> tuple[int, int]:
    """Width and number of blocks of the model of an engine."""
    config = vllm_config.model_config.hf_text_config
    return int(config.hidden_size), int(config.num_hidden_layers)
