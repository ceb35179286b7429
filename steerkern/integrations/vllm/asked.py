"""What a request asks for, and the ticket that it gets: plans by digest, and where their steering shows in the cache.

Offline: ``SamplingParams(extra_args={"steerkern": {"plan": "calm", "scale": 1.5, "scope": "decode"}})``, a name, a list
of either, or None. Over HTTP: ``"vllm_xargs": {"steerkern": "calm", "steerkern_scale": 1.5}``, with ``"none"`` for None
and the offline form as JSON text where it says more.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ...steps import PHASES
from .settings import NAME, PLAIN, check_scale

SCALE, SCOPE, RECEIPT, TICKET = (f"{NAME}_{what}" for what in ("scale", "scope", "receipt", "ticket"))
MAX_PLANS = 8
"""Plans of one request."""


class FieldError(ValueError):
    """A field of a request that is not allowed."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


class Wish(NamedTuple):
    """One plan that a request asks for."""

    name: str
    scale: float = 1.0
    scope: str | None = None
    """In place of the plan's own scope."""


def wishes(extra_args: Mapping[str, Any]) -> list[Wish] | None:
    """The plans that a request asks for; an empty list leaves it alone, None is nothing said.

    Raises:
        FieldError: naming the field.
    """
    own = {name: value for name, value in extra_args.items() if name.startswith(NAME)}
    unknown = sorted(own.keys() - {NAME, SCALE, SCOPE, RECEIPT})
    if unknown:
        known = f"{NAME}, {SCALE}, {SCOPE} and {RECEIPT}"
        raise FieldError(unknown[0], f"{unknown[0]} is no field; known are {known}")
    if NAME not in own:
        if SCALE in own or SCOPE in own:
            field = SCALE if SCALE in own else SCOPE
            raise FieldError(field, f"{field} needs {NAME}, the plan that it is meant for")
        return None
    defaults = {"scale": own.get(SCALE, 1.0), "scope": own.get(SCOPE)}
    given = _parsed(own[NAME])
    several = given if isinstance(given, (list, tuple)) else [given]
    if len(several) > MAX_PLANS:
        raise FieldError(NAME, f"{NAME} names {len(several)} plans, allowed are {MAX_PLANS}")
    made = [wish for one in several if (wish := _wish(one, defaults)) is not None]
    names = [wish.name for wish in made]
    if len(set(names)) < len(names):
        raise FieldError(NAME, f"{NAME} names a plan twice: {names}")
    return [wish for wish in made if wish.scale]


def _parsed(given: object) -> object:
    if not isinstance(given, str) or not given.lstrip().startswith(("{", "[")):
        return given
    try:
        parsed: object = json.loads(given)
    except ValueError as error:
        raise FieldError(NAME, f"{NAME} is no JSON: {error}") from None
    return parsed


def _wish(given: object, defaults: Mapping[str, Any]) -> Wish | None:
    if given is None or given == PLAIN:
        return None
    fields = {"plan": given} if isinstance(given, str) else given
    if not isinstance(fields, Mapping) or not isinstance(fields.get("plan"), str):
        allowed = "a plan's name or {'plan': name, ...}"
        raise FieldError(NAME, f"{NAME} must be {allowed}, got {reprlib.repr(given)}")
    unknown = sorted(set(fields) - {"plan", "scale", "scope"})
    if unknown:
        raise FieldError(NAME, f"{NAME}.{unknown[0]} is no field; known are plan, scale and scope")
    scope = fields.get("scope", defaults["scope"])
    if scope is not None and scope not in PHASES:
        raise FieldError(SCOPE, f"{SCOPE} must be one of {', '.join(PHASES)}, got {reprlib.repr(scope)}")
    try:
        scale = check_scale(fields.get("scale", defaults["scale"]), SCALE)
    except (TypeError, ValueError) as error:
        raise FieldError(SCALE, str(error)) from None
    return Wish(fields["plan"], scale, scope)


class Variant(NamedTuple):
    """A plan as a request has it."""

    digest: str
    scale: float
    scope: str | None


@dataclass(frozen=True)
class Ticket:
    """What the engine needs to know of a steered request; travels in its ``extra_args``."""

    plans: tuple[Variant, ...]
    first: int
    """The first position that a plan may write."""
    by_length: int
    """The first position from which on the steering depends on the prompt's length."""
    prompt: int
    """Tokens of the prompt."""
    receipt: str = ""
    """Under what a receipt is kept; empty for none."""

    @property
    def key(self) -> str:
        """Equal for requests whose plans do the same."""
        return hashlib.sha256(repr(self.plans).encode()).hexdigest()

    def to_wire(self) -> dict[str, Any]:
        """As msgpack carries it."""
        return {**asdict(self), "plans": [list(variant) for variant in self.plans]}

    @staticmethod
    def from_wire(record: Mapping[str, Any]) -> Ticket:
        """What :meth:`to_wire` gave."""
        return Ticket(**{**record, "plans": tuple(Variant(*variant) for variant in record["plans"])})


def ticket_of(sampling_params: Any) -> Ticket | None:
    """The ticket of a request inside the engine; None for a plain one."""
    extra = getattr(sampling_params, "extra_args", None)
    record = extra.get(TICKET) if extra else None
    return None if record is None else Ticket.from_wire(record)
