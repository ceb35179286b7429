"""Decisions: what is decided once per request, from the states of its prompt, and then holds for every token of it.

A :class:`Latch` opens or closes a step (CAST, arXiv 2409.05907; Latent Guard, 2507.11878); a controller gives it one
strength per layer (:mod:`steerkern.controller`). Both name the states that they read, and get them as ``[B, R, H]``.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Union

import torch
from torch import Tensor

from .directions import Direction, check_layer, check_site, check_vector
from .vectors import finite, interval

Measure = Literal["coordinate", "cosine", "cast"]
MEASURES = ("coordinate", "cosine", "cast")


class Read(NamedTuple):
    """One state that a decision looks at: a site of the residual stream, at one prompt token or over all of them.

    ``token`` counts from the prompt's end (-1 is ``t_post``) or start, as in a scope; ``"mean"`` is the mean over the
    prompt's tokens.
    """

    layer: int
    site: str = "resid_pre"
    token: Union[int, Literal["mean"]] = -1

    def __str__(self) -> str:
        return f"{self.site}[{self.layer}] at {'the prompt mean' if self.token == 'mean' else f'token {self.token}'}"


def check_read(read: Read) -> Read:
    """The same read; ValueError if its layer, site or token is none."""
    check_layer(read.layer)
    check_site(read.site)
    if read.token != "mean" and type(read.token) is not int:
        raise ValueError(f"token must be a position or 'mean', got {reprlib.repr(read.token)}")
    return read


class Gains(Protocol):
    """What a step asks for its strength: a :class:`~steerkern.controller.Controller`."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """The states that it reads."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it weighs."""

    @property
    def width(self) -> int:
        """``H`` of the states."""

    @property
    def every_token(self) -> bool:
        """Whether it is asked in every forward, about that forward's last token, and not once about the prompt."""

    def gains(self, states: Tensor) -> Tensor:
        """``[B, R, H]`` to one strength per request and layer, float32 ``[B, len(layers)]``."""

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON values and tensors from which the same controller can be made again."""


@dataclass(frozen=True, eq=False)
class Term:
    """``weight * measure(state, vector)`` of one state.

    ``coordinate`` is ``<h, v/|v|>`` in residual units, ``cosine`` is ``cos(h, v)``, and ``cast`` the similarity of
    arXiv 2409.05907, ``cos(h, tanh(P h))`` with the projector ``P`` on ``v``: it is never negative, and close to
    ``|cos(h, v)|`` for small states.
    """

    read: Read
    vector: Tensor
    weight: float = 1.0
    measure: Measure = "cosine"

    def __post_init__(self) -> None:
        check_read(self.read)
        vector = self.vector.unit if isinstance(self.vector, Direction) else self.vector
        object.__setattr__(self, "vector", check_vector(vector, "condition").detach().float())
        finite(self.weight, "weight", nonzero=True)
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {reprlib.repr(self.measure)}")

    def value(self, states: Tensor) -> Tensor:
        """``[B, H]`` to ``[B]``."""
        h = states.float()
        unit = (self.vector / self.vector.norm()).to(h.device)
        along: Tensor = h @ unit
        if self.measure == "coordinate":
            return self.weight * along
        other = unit.expand_as(h) if self.measure == "cosine" else torch.tanh(along[:, None] * unit)
        similarity: Tensor = torch.nn.functional.cosine_similarity(h, other, dim=-1)
        return self.weight * similarity


@dataclass(frozen=True, eq=False)
class Condition:
    """True where the sum of ``terms`` lies in ``[lo, hi]``."""

    terms: tuple[Term, ...]
    lo: float = -math.inf
    hi: float = math.inf

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a condition needs at least one term, got none")
        interval(self.lo, self.hi, "condition")
        if len(widths := {len(term.vector) for term in self.terms}) > 1:
            raise ValueError(f"a condition mixes vectors of widths {sorted(widths)}")

    def score(self, states: dict[Read, Tensor]) -> Tensor:
        """The sum of the terms, ``[B]``."""
        return torch.stack([term.value(states[term.read]) for term in self.terms]).sum(0)

    def holds(self, states: dict[Read, Tensor]) -> Tensor:
        """Bool ``[B]``; a score that is NaN does not hold."""
        score = self.score(states)
        return (score >= self.lo) & (score <= self.hi)


@dataclass(frozen=True, eq=False)
class Latch:
    """Opens a step for a whole request if ``any`` (or ``all``) of its conditions hold for the prompt.

    >>> import torch
    >>> c = torch.tensor([1.0, 0.0])
    >>> latch = Latch((Condition((Term(Read(3, "resid_pre", "mean"), c, measure="cast"),), lo=0.5),))
    >>> latch.opens(torch.tensor([[[0.2, 0.0]], [[0.0, 0.2]]]))
    tensor([ True, False])
    """

    conditions: tuple[Condition, ...]
    rule: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if not self.conditions:
            raise ValueError("a latch needs at least one condition, got none")
        if self.rule not in ("any", "all"):
            raise ValueError(f"rule must be 'any' or 'all', got {reprlib.repr(self.rule)}")
        if len(widths := {len(term.vector) for c in self.conditions for term in c.terms}) > 1:
            raise ValueError(f"a latch mixes vectors of widths {sorted(widths)}")

    @property
    def reads(self) -> tuple[Read, ...]:
        """The states that the conditions look at, each once."""
        return tuple(dict.fromkeys(term.read for c in self.conditions for term in c.terms))

    @property
    def width(self) -> int:
        """``H`` of the states."""
        return len(self.conditions[0].terms[0].vector)

    def opens(self, states: Tensor) -> Tensor:
        """Bool ``[B]`` from states ``[B, R, H]`` in the order of ``reads``."""
        by_read = dict(zip(self.reads, states.unbind(1), strict=True))
        held = torch.stack([condition.holds(by_read) for condition in self.conditions])
        return held.any(0) if self.rule == "any" else held.all(0)


def cast(
    condition: Tensor | Direction,
    layer: int,
    threshold: float,
    *,
    fires: Literal["above", "below"] = "above",
    token: int | Literal["mean"] = "mean",
) -> Condition:
    """The condition of CAST (arXiv 2409.05907): similarity of the prompt with a condition vector, against a threshold.

    ``fires="below"`` is what its code calls "larger" (the threshold is the larger one).

    Raises:
        ValueError: a threshold that the similarity, which lies in [0, 1], never or always passes.
    """
    size = finite(threshold, "threshold")
    if not 0.0 < size < 1.0:
        raise ValueError(f"the similarity lies in [0, 1]: a threshold of {threshold} decides nothing")
    if fires not in ("above", "below"):
        raise ValueError(f"fires must be 'above' or 'below', got {reprlib.repr(fires)}")
    term = Term(Read(layer, "resid_pre", token), condition, measure="cast")  # type: ignore[arg-type]
    return Condition((term,), lo=size) if fires == "above" else Condition((term,), hi=size)
