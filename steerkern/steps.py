"""Steps: edits together with the layers, the site and the tokens at which they act; the pieces of a plan."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Union

from .decisions import Gains, Latch
from .directions import check_layer, check_site
from .edits import Edit
from .errors import PlanError
from .vectors import finite

Layers = Union[Literal["all"], int, Iterable[int]]
Marker = tuple[tuple[int, ...], ...]
"""Token sequences that mean the same event: the ways in which a tokenizer may write one text."""

PHASES = ("all", "prompt", "decode", "reply")
_ALLOWED = f"scope must be {', '.join(map(repr, PHASES))}, positions or Tokens(...)"


@dataclass(frozen=True)
class Tokens:
    """The tokens that a step writes, in positions of the unpadded sequence.

    ``phase`` is ``all``, ``prompt``, ``decode`` (tokens after the prompt) or ``reply`` (those whose outputs are the
    reply: the last prompt token and all after it, so that the first generated token is steered too). ``positions``
    picks prompt tokens, negative ones counted from its end: ``-1`` is ``t_post``, the last token of the templated
    prompt. ``start`` and ``stop`` bound the position over prompt and generated tokens alike; negative ones count from
    the end of the prompt: ``stop=-5`` leaves its last five tokens and the reply alone, ``start=-5`` acts from its fifth
    last token on.

    Events narrow this down. ``after`` lets the step act on the tokens that follow the latest occurrence of a token
    sequence, ``until`` stops it after the last token of one, so ``until=m`` and ``after=m`` meet without a gap; both
    look at prompt and generated tokens (:func:`steerkern.marker` makes them from a text). ``first`` keeps the first n
    tokens and ``every`` each n-th, counted from the event, else from where the phase begins.

    Raises:
        ValueError: another phase, no position or one that is not a whole number, an empty range, or an empty event.
    """

    phase: str = "all"
    positions: tuple[int, ...] | None = None
    start: int = 0
    stop: int | None = None
    after: Marker | None = None
    until: Marker | None = None
    first: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"{_ALLOWED}, got {reprlib.repr(self.phase)}")
        if self.positions is not None:
            numbers = self.positions
            if not isinstance(numbers, (tuple, list)) or not numbers or any(type(p) is not int for p in numbers):
                raise ValueError(f"positions must be whole numbers, at least one, got {reprlib.repr(numbers)}")
            if self.phase in ("decode", "reply"):
                raise ValueError(f"positions pick prompt tokens: phase {self.phase!r} has none to pick")
            if self.first is not None or self.every != 1:
                raise ValueError("positions pick single tokens: first and every have nothing to count")
            object.__setattr__(self, "positions", tuple(numbers))
        if type(self.start) is not int:
            raise ValueError(f"start must be a whole number, got {reprlib.repr(self.start)}")
        if self.stop is not None and type(self.stop) is not int:
            raise ValueError(f"stop must be a whole number, got {reprlib.repr(self.stop)}")
        # what is counted from the two ends of the prompt can only be compared when that is known
        if self.stop is not None and (self.start < 0) == (self.stop < 0) and self.stop <= self.start:
            raise ValueError(f"stop must be above start {self.start}, got {self.stop}")
        if self.stop is not None and self.stop < 0 and self.phase in ("decode", "reply"):
            raise ValueError(f"stop {self.stop} counts from the end of the prompt: phase {self.phase!r} is past it")
        for name in ("after", "until"):
            object.__setattr__(self, name, _marker(getattr(self, name), name))
        if self.first is not None and (type(self.first) is not int or self.first < 1):
            raise ValueError(f"first must be a whole number from 1, got {reprlib.repr(self.first)}")
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"every must be a whole number from 1, got {reprlib.repr(self.every)}")

    @property
    def markers(self) -> tuple[Marker, ...]:
        """The events that have to be looked for."""
        return tuple(marker for marker in (self.after, self.until) if marker is not None)

    @property
    def steady(self) -> bool:
        """Whether the generated tokens of a request are all in, or all out."""
        return not (self.start or self.stop is not None or self.markers or self.first is not None or self.every != 1)

    @property
    def writes_prompt(self) -> bool:
        """Whether a prompt token can be among them."""
        return self.phase != "decode"


def _marker(given: object, name: str) -> Marker | None:
    if given is None:
        return None
    sequences = given if isinstance(given, (tuple, list)) else ()
    if sequences and all(type(token) is int for token in sequences):
        sequences = (sequences,)  # one sequence, written plainly
    if not sequences or any(
        not isinstance(s, (tuple, list)) or not s or any(type(t) is not int or t < 0 for t in s) for s in sequences
    ):
        raise ValueError(f"{name} must be token ids, one sequence or several, got {reprlib.repr(given)}")
    return tuple(tuple(sequence) for sequence in sequences)


Scope = Union[str, int, Sequence[int], Tokens]


@dataclass(frozen=True, eq=False)
class Step:
    """Edits that act together at some layers of one site, on the same tokens."""

    edits: tuple[Edit, ...]
    layers: tuple[int, ...] | None
    """Layer numbers, or None for every layer that the model (or the edits' vectors) has."""
    site: str
    tokens: Tokens
    keep_norm: bool = False
    scale: float = 1.0
    latch: Latch | None = None
    """Decides once per request, from its prompt, whether the step acts."""
    controller: Gains | None = None
    """Decides once per request how strongly the step acts at each layer."""

    def __post_init__(self) -> None:
        if not self.edits:
            raise ValueError("a step needs at least one edit, got none")
        check_site(self.site)
        finite(self.scale, "scale", nonzero=True)
        for name, decision in (("latch", self.latch), ("controller", self.controller)):
            if decision is not None and decision.width != self.edits[0].width:
                raise PlanError(f"the {name} reads width {decision.width}, the edits have {self.edits[0].width}")
        if self.controller is not None:
            named = self.layers if self.layers is not None else self.edits[0].layers
            missing = sorted(set(named or ()) - set(self.controller.layers))
            if missing:
                own = reprlib.repr(list(self.controller.layers))
                raise PlanError(f"layer {missing[0]}: the controller weighs layers {own}")
        if self.latch is not None and self.controller is not None and self.controller.every_token:
            raise PlanError("a controller that is asked at every token takes no latch")

    @property
    def decisions(self) -> tuple[Latch | Gains, ...]:
        """What has to be decided before the step can act."""
        return tuple(decision for decision in (self.latch, self.controller) if decision is not None)

    @property
    def each_token(self) -> bool:
        """Whether its controller is asked in every forward, and not once about the prompt."""
        return self.controller is not None and self.controller.every_token


def parse_layers(layers: Layers) -> tuple[int, ...] | None:
    """Sorted layer numbers, or None for every layer.

    Raises:
        TypeError, ValueError: neither ``"all"`` nor whole numbers from 0.
    """
    if isinstance(layers, str):
        if layers == "all":
            return None
        raise ValueError(f"layers must be 'all', a number or several, got {reprlib.repr(layers)}")
    if not isinstance(layers, (int, Iterable)):
        raise TypeError(f"layers must be 'all', a number or several, got {reprlib.repr(layers)}")
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    if not numbers:
        raise ValueError("layers must name at least one layer, got none")
    return tuple(sorted({check_layer(layer) for layer in numbers}))


def parse_scope(scope: Scope) -> Tokens:
    """The :class:`Tokens` that a scope stands for.

    Raises:
        TypeError, ValueError: none of the forms of a scope.
    """
    if isinstance(scope, Tokens):
        return scope
    if isinstance(scope, str):
        return Tokens(phase=scope)
    if isinstance(scope, int):
        return Tokens("prompt", (scope,))
    if isinstance(scope, Iterable):
        return Tokens("prompt", tuple(scope))
    raise TypeError(f"{_ALLOWED}, got {reprlib.repr(scope)}")


def describe(step: Step) -> str:
    """One line for a person: kinds, site, layers, tokens and modifiers."""
    text = f"{'+'.join(map(_kind, step.edits))} at {step.site}"
    text += f"[{'all' if step.layers is None else ', '.join(map(str, step.layers))}]"
    tokens = step.tokens
    if tokens.positions is not None:
        text += f", prompt tokens {list(tokens.positions)}"
    elif tokens.phase != "all":
        text += f", {tokens.phase}"
    if tokens.start or tokens.stop is not None:
        text += f", tokens {tokens.start}:{'' if tokens.stop is None else tokens.stop}"
    if tokens.after is not None:
        text += f", after tokens {_sequences(tokens.after)}"
    if tokens.until is not None:
        text += f", until tokens {_sequences(tokens.until)}"
    if tokens.first is not None:
        text += f", first {tokens.first}"
    if tokens.every != 1:
        text += f", every {tokens.every}"
    if step.latch is not None:
        text += f", if {step.latch.rule} of {len(step.latch.conditions)} conditions"
    if step.controller is not None:
        text += ", weighted by a controller"
    return text + (", norm kept" if step.keep_norm else "") + (f", scale {step.scale:g}" if step.scale != 1 else "")


def _sequences(marker: Marker) -> str:
    return " or ".join(" ".join(map(str, sequence)) for sequence in marker)


def _kind(edit: Edit) -> str:
    return edit.kind + ("|gate" if edit.gate else "") + (" (orthonormalised)" if edit.orthonormalised else "")
