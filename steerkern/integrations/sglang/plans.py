"""The plans of a server, and which of them a request asks for."""

from __future__ import annotations

import functools
import hashlib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import PlanError
from ...plan import Plan
from ...runtime.block_names import depends_on_length
from ...runtime.prompts import Prompts
from ...steps import PHASES, Step
from ...vectors import finite

FIELD = "steerkern"
"""The key of a request's ``custom_params``."""

MAX_SCALE = 1e4
_KNOWN = ("plan", "scale", "scope")


@dataclass(frozen=True)
class Variant:
    """A plan as one request wants it: with its scale and scope."""

    plan: Plan
    """Under a name that no other variant has."""
    by_length: bool
    """Whether what it does to a token depends on how long the prompt is."""

    def salt(self, prompt: int) -> str:
        """What has to be part of the prefix cache's key: requests of one salt write the same keys and values."""
        text = f"{self.plan.digest} {prompt}" if self.by_length else self.plan.digest
        return f"{FIELD}:{hashlib.sha256(text.encode()).hexdigest()}"

    def check_prompt(self, length: int) -> None:
        """Raise PlanError if a prompt of that many tokens lacks a position that the plan writes."""
        prompts = Prompts.of(1, length, None)
        for step in self.plan.steps:
            for position in step.tokens.positions or ():
                prompts.place(position)


class Plans:
    """The plans that requests can name.

    Raises:
        PlanError: two of one name, or one that needs what is not there in SGLang: a decision about the prompt, events,
            probes, another site than ``resid_pre`` and ``resid_post``.
    """

    def __init__(self, plans: Iterable[Plan]) -> None:
        self.by_name: dict[str, Plan] = {}
        for plan in plans:
            if plan.name in self.by_name:
                raise PlanError(f"two plans are named {plan.name!r}")
            for step in plan.steps:
                if why := _unsupported(step):
                    raise PlanError(f"plan {plan.name!r} {why}, which is not supported in SGLang")
            self.by_name[plan.name] = plan
        self._variant = functools.lru_cache(maxsize=1024)(self._make)

    @staticmethod
    def read(folders: Sequence[str]) -> Plans:
        """From folders that :meth:`Plan.save_pretrained` wrote; ArtifactError names what is wrong with one."""
        return Plans(Plan.from_pretrained(folder) for folder in folders)

    def variant(self, custom_params: object) -> Variant | None:
        """What a request's ``custom_params`` ask for; None leaves it alone.

        Raises:
            ValueError: one sentence that names the field and what it may be.
        """
        wanted = custom_params.get(FIELD) if isinstance(custom_params, Mapping) else None
        if wanted is None:
            return None
        if not isinstance(wanted, Mapping) or "plan" not in wanted:
            raise ValueError(f'{FIELD} must be an object such as {{"plan": "name"}}, got {reprlib.repr(wanted)}')
        if odd := [key for key in wanted if key not in _KNOWN]:
            raise ValueError(f"{FIELD} has no field {reprlib.repr(odd[0])}; known are {', '.join(_KNOWN)}")
        name, scope = wanted["plan"], wanted.get("scope")
        if not isinstance(name, str) or name not in self.by_name:
            known = ", ".join(map(repr, self.by_name)) or "none"
            raise ValueError(f"{FIELD}.plan must be one of {known}, got {reprlib.repr(name)}")
        if scope is not None and (not isinstance(scope, str) or scope not in PHASES):
            raise ValueError(f"{FIELD}.scope must be {', '.join(map(repr, PHASES))}, got {reprlib.repr(scope)}")
        return self._variant(name, _scale(wanted.get("scale", 1.0)), scope)

    def _make(self, name: str, scale: float, scope: str | None) -> Variant:
        plan = self.by_name[name]
        try:
            plan = plan.scaled(scale)
        except ValueError as error:  # a step's own scale times this one
            raise ValueError(f"{FIELD}.{error}") from None
        plan = plan if scope is None else plan.scoped(scope)
        unique = plan.named(f"{name[:60]}-{plan.digest}")
        return Variant(unique, any(depends_on_length(step) for step in plan.steps))


def _scale(given: Any) -> float:
    if isinstance(given, bool):
        raise ValueError(f"{FIELD}.scale must be a number, got {given}")
    try:
        scale = finite(given, f"{FIELD}.scale", nonzero=True)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if abs(scale) > MAX_SCALE:
        raise ValueError(f"{FIELD}.scale must lie within {-MAX_SCALE:g} and {MAX_SCALE:g}, got {scale:g}")
    return scale


def _unsupported(step: Step) -> str:
    if step.decisions:
        return "decides from the prompt (a latch or a controller)"
    if step.tokens.markers:
        return "waits for an event in the text"
    if any(edit.kind == "probe" for edit in step.edits):
        return "has a probe"
    if step.site not in ("resid_pre", "resid_post"):
        return f"writes {step.site}"
    return ""
