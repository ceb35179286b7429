"""Steps: edits together with the layers, the site and the tokens at which they act; the pieces of a plan."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Union

from .directions import check_layer, check_site
from .edits import Edit
from .vectors import finite

Layers = Union[Literal["all"], int, Iterable[int]]


@dataclass(frozen=True)
class Tokens:
    """The tokens that a step writes, in positions of the unpadded sequence.

    ``phase`` is ``all``, ``prompt`` or ``decode`` (tokens after the prompt). ``positions`` picks prompt tokens,
    negative ones counted from its end: ``-1`` is ``t_post``, the last token of the templated prompt. ``start`` and
    ``stop`` bound the position over prompt and generated tokens alike.

    Raises:
        ValueError: another phase, no position or one that is not a whole number, or an empty range.
    """

    phase: str = "all"
    positions: tuple[int, ...] | None = None
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.phase not in ("all", "prompt", "decode"):
            raise ValueError(
                f"scope must be 'all', 'prompt', 'decode', positions or Tokens(...), got {reprlib.repr(self.phase)}"
            )
        if self.positions is not None:
            numbers = self.positions
            if not isinstance(numbers, (tuple, list)) or not numbers or any(type(p) is not int for p in numbers):
                raise ValueError(f"positions must be whole numbers, at least one, got {reprlib.repr(numbers)}")
            if self.phase == "decode":
                raise ValueError("positions pick prompt tokens: phase 'decode' has none")
            object.__setattr__(self, "positions", tuple(numbers))
        if type(self.start) is not int or self.start < 0:
            raise ValueError(f"start must be a whole number from 0, got {reprlib.repr(self.start)}")
        if self.stop is not None and (type(self.stop) is not int or self.stop <= self.start):
            raise ValueError(f"stop must be a whole number above start {self.start}, got {reprlib.repr(self.stop)}")


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

    def __post_init__(self) -> None:
        if not self.edits:
            raise ValueError("a step needs at least one edit, got none")
        check_site(self.site)
        finite(self.scale, "scale", nonzero=True)


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
    raise TypeError(f"scope must be 'all', 'prompt', 'decode', positions or Tokens(...), got {reprlib.repr(scope)}")


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
    return text + (", norm kept" if step.keep_norm else "") + (f", scale {step.scale:g}" if step.scale != 1 else "")


def _kind(edit: Edit) -> str:
    return edit.kind + ("|gate" if edit.gate else "") + (" (orthonormalised)" if edit.orthonormalised else "")
