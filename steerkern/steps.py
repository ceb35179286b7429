"""Steps: edits together with the layers, the site and the tokens at which they act; the pieces of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Union

from .edits import Edit

Layers = Union[Literal["all"], int, Iterable[int]]


@dataclass(frozen=True)
class Tokens:
    """The tokens that a step writes, in positions of the unpadded sequence.

    ``phase`` is ``all``, ``prompt`` or ``decode`` (tokens after the prompt). ``positions`` picks prompt tokens, negative
    ones counted from its end: ``-1`` is ``t_post``, the last token of the templated prompt. ``start`` and ``stop``
    bound the position over prompt and generated tokens alike.
    """

    phase: str = "all"
    positions: tuple[int, ...] | None = None
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.phase not in ("all", "prompt", "decode"):
            raise ValueError(f"scope must be 'all', 'prompt', 'decode', positions or Tokens(...), got {self.phase!r}")
        if self.positions is not None:
            if not self.positions or any(type(p) is not int for p in self.positions):
                raise ValueError(f"positions must be whole numbers, at least one, got {self.positions!r}")
            if self.phase == "decode":
                raise ValueError("positions pick prompt tokens: phase 'decode' has none")
        if type(self.start) is not int or self.start < 0:
            raise ValueError(f"start must be a number from 0, got {self.start!r}")
        if self.stop is not None and (type(self.stop) is not int or self.stop <= self.start):
            raise ValueError(f"stop must be a number above start {self.start}, got {self.stop!r}")


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


def parse_layers(layers: Layers) -> tuple[int, ...] | None:
    """Sorted layer numbers, or None for every layer."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers must be 'all', a number or several, got {layers!r}")
        return None
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    if not numbers:
        raise ValueError("layers must name at least one layer, got none")
    for layer in numbers:
        if type(layer) is not int or layer < 0:
            raise ValueError(f"layer must be a number from 0, got {layer!r}")
    return tuple(sorted(set(numbers)))


def parse_scope(scope: Scope) -> Tokens:
    """The :class:`Tokens` that a scope stands for."""
    if isinstance(scope, Tokens):
        return scope
    if isinstance(scope, str):
        return Tokens(phase=scope)
    if isinstance(scope, int):
        return Tokens("prompt", (scope,))
    return Tokens("prompt", tuple(scope))


def describe(step: Step) -> str:
    """One line for a person: kinds, site, layers, tokens and modifiers."""
    kinds = "+".join(e.kind + ("|gate" if e.gate else "") + (" (orthonormalised)" if e.orthonormalised else "") for e in step.edits)
    text = f"{kinds} at {step.site}[{'all' if step.layers is None else ', '.join(map(str, step.layers))}]"
    tokens = step.tokens
    if tokens.positions is not None:
        text += f", prompt tokens {list(tokens.positions)}"
    elif tokens.phase != "all":
        text += f", {tokens.phase}"
    if tokens.start or tokens.stop is not None:
        text += f", tokens {tokens.start}:{'' if tokens.stop is None else tokens.stop}"
    return text + (", norm kept" if step.keep_norm else "") + (f", scale {step.scale:g}" if step.scale != 1 else "")
