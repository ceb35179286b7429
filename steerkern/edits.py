"""Edits: maps on the coordinates of a residual row.

Every edit known to the literature changes a row ``h [H]`` along a few directions only::

    a_e = <h, v_e>        h += sum_e (a'_e - a_e) * v_e

so an :class:`Edit` is a set of directions and, per direction, the four numbers of the map
``a' = clamp((1 - beta) * a + alpha, lo, hi)`` (or a rotation of a pair). The constructors below are the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Union

import torch
from torch import Tensor

from .artifacts import Fingerprint
from .directions import Direction, Directions, check_vector
from .ops.schemas import MAX_ENTRIES

Vector = Union[Tensor, Direction]
Source = Union[Vector, Sequence[Vector], Directions, Mapping[int, Tensor]]
"""One vector for every layer, several vectors (a subspace), or one vector per layer."""

KINDS = ("add", "ablate", "clamp", "cap", "rotate", "probe")
_INF = math.inf


@dataclass(frozen=True, eq=False)
class Rows:
    """The directions of an edit at one layer: ``vectors [k, H]`` float32 and the map of each coordinate.

    ``norms`` are the norms of the vectors as they were given.
    """

    vectors: Tensor
    norms: tuple[float, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    lo: tuple[float, ...]
    hi: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Gate:
    """Open where the coordinate (or the cosine) of the row along ``unit [H]`` lies in ``[lo, hi]``."""

    unit: Tensor
    lo: float
    hi: float
    cosine: bool


@dataclass(frozen=True, eq=False)
class Edit:
    """A map on coordinates, per layer (key ``None``: the same at every layer).

    ``orthonormalised`` says that the given vectors were replaced by an orthonormal basis of their span.
    """

    kind: str
    rows: Mapping[int | None, Rows]
    gate: Gate | None = None
    model: Fingerprint | None = None
    orthonormalised: bool = False

    @property
    def width(self) -> int:
        """Width ``H`` of the directions."""
        return next(iter(self.rows.values())).vectors.shape[1]

    @property
    def rank(self) -> int:
        """Directions per layer."""
        return next(iter(self.rows.values())).vectors.shape[0]

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layers that have their own vectors, or None if one set serves all."""
        return None if None in self.rows else tuple(sorted(k for k in self.rows if k is not None))

    def when(self, condition: Vector, lo: float = -_INF, hi: float = _INF, *, cosine: bool = False) -> Edit:
        """Let the edit act only on rows whose coordinate along ``condition [H]`` lies in ``[lo, hi]``.

        The coordinate is ``<h, c/|c|>`` in residual units; with ``cosine`` it is divided by ``|h|``.
        The condition reads the row as it arrived (CAST, arXiv 2409.05907, in its row-local form).

        Raises:
            ValueError: an interval that is empty or that bounds nothing, or a condition of another width.
        """
        lo, hi = float(lo), float(hi)
        if not lo <= hi:
            raise ValueError(f"gate needs lo <= hi, got [{lo}, {hi}]")
        if lo == -_INF and hi == _INF:
            raise ValueError("gate needs lo or hi: the interval [-inf, inf] is always open")
        if cosine and (lo > 1.0 or hi < -1.0):
            raise ValueError(f"a cosine lies in [-1, 1], got the interval [{lo}, {hi}]")
        unit = _unit(condition)
        if unit.numel() != self.width:
            raise ValueError(f"gate has width {unit.numel()}, the edit has {self.width}")
        return replace(self, gate=Gate(unit, lo, hi, cosine))


def add(source: Source, coefficient: float = 1.0) -> Edit:
    """``h + coefficient * v``: CAA (arXiv 2312.06681), ActAdd (2308.10248), control vectors.

    ``v`` is the raw vector: a tensor as given, a :class:`Direction` times its norm (``direction.unit`` adds the unit
    vector). Several vectors are added together.

    >>> import torch
    >>> add(torch.ones(4), 0.5).kind
    'add'
    """
    c = _finite(coefficient, "coefficient")
    if c == 0.0:
        raise ValueError("coefficient must not be 0: the edit would do nothing")
    return _edit("add", source, raw=True, alpha=c)


def ablate(source: Source, amount: float = 1.0) -> Edit:
    r"""``h - amount * V^T V h``: directional ablation (arXiv 2406.11717); ``amount`` below 1 removes a part.

    Several vectors are orthonormalised and removed as a subspace.
    """
    amount = _finite(amount, "amount")
    if amount == 0.0:
        raise ValueError("amount must not be 0: the edit would do nothing")
    return _edit("ablate", source, beta=amount)


def clamp(source: Source, target: float) -> Edit:
    """Set the coordinate along the unit direction to ``target`` (residual units); ``target`` of a mean is affine ablation."""
    return _edit("clamp", source, alpha=_finite(target, "target"), beta=1.0)


def cap(source: Source, lo: float = -_INF, hi: float = _INF) -> Edit:
    """Keep the coordinate along the unit direction inside ``[lo, hi]``; rows inside keep their bits."""
    lo, hi = float(lo), float(hi)
    if not lo <= hi:
        raise ValueError(f"cap needs lo <= hi, got [{lo}, {hi}]")
    if lo == -_INF and hi == _INF:
        raise ValueError("cap needs lo or hi: the interval [-inf, inf] bounds nothing")
    return _edit("cap", source, lo=lo, hi=hi)


def rotate(first: Vector, second: Vector, degrees: float) -> Edit:
    """Turn the part of the row in the plane of two vectors to the angle ``degrees`` from the first; norms are kept.

    ``b1`` is the first vector's unit, ``b2`` the second's part orthogonal to it; ``|P h|`` stays
    (Angular Steering, arXiv 2510.26243: an absolute target angle).
    """
    angle = math.radians(_finite(degrees, "degrees"))
    edit = _edit("rotate", (first, second))
    rows = edit.rows[None]
    return replace(edit, rows={None: replace(rows, alpha=(math.cos(angle), math.sin(angle)))})


def probe(source: Source) -> Edit:
    """Read the coordinates along unit directions without changing the row."""
    return _edit("probe", source)


def _edit(
    kind: str,
    source: Source,
    *,
    raw: bool = False,
    alpha: float = 0.0,
    beta: float = 0.0,
    lo: float = -_INF,
    hi: float = _INF,
) -> Edit:
    subspace = kind in ("ablate", "rotate")
    given = _by_layer(source)
    rows: dict[int | None, Rows] = {}
    for layer, vectors in given.items():
        where = "" if layer is None else f" of layer {layer}"
        k = len(vectors)
        if not 1 <= k <= MAX_ENTRIES:
            raise ValueError(f"{kind} takes 1 to {MAX_ENTRIES} vectors{where}, got {k}")
        stack = torch.stack([check_vector(_raw(v), f"{kind} vector{where}") for v in vectors])
        norms = stack.double().norm(dim=1)
        if not raw:
            stack = (_orthonormal(stack, kind + where) if subspace else stack.double() / norms[:, None]).float()
        rows[layer] = Rows(stack, tuple(norms.tolist()), (alpha,) * k, (beta,) * k, (lo,) * k, (hi,) * k)
    if len({r.vectors.shape for r in rows.values()}) > 1:
        raise ValueError(f"{kind} vectors must have one width at every layer")
    models = {v.model for vectors in given.values() for v in vectors if isinstance(v, Direction)} - {None}
    if len(models) > 1:
        raise ValueError(f"{kind} vectors come from different models: {', '.join(map(str, models))}")
    several = len(next(iter(given.values()))) > 1
    return Edit(kind, rows, None, models.pop() if models else None, subspace and several)


def _by_layer(source: Source) -> dict[int | None, tuple[Vector, ...]]:
    if isinstance(source, (Tensor, Direction)):
        if isinstance(source, Tensor) and source.dim() == 2:
            return {None: tuple(source)}
        return {None: (source,)}
    if isinstance(source, Directions):
        return {layer: (direction,) for layer, direction in source.items()}
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("vectors per layer: got an empty mapping")
        for layer in source:
            if type(layer) is not int or layer < 0:
                raise ValueError(f"layer must be a number from 0, got {layer!r}")
        return {layer: tuple(v) if v.dim() == 2 else (v,) for layer, v in source.items()}
    if isinstance(source, Sequence) and not isinstance(source, str):
        widths = {_raw(v).numel() for v in source}
        if len(widths) > 1:
            raise ValueError(f"vectors must have one width, got {sorted(widths)}")
        return {None: tuple(source)}
    raise TypeError(f"vectors must be tensors, Directions or a mapping of layers, got {type(source).__name__}")


def _raw(vector: Vector) -> Tensor:
    return vector.raw if isinstance(vector, Direction) else vector


def _unit(vector: Vector) -> Tensor:
    checked = check_vector(_raw(vector), "gate direction").double()
    return (checked / checked.norm()).float()


def _orthonormal(stack: Tensor, what: str) -> Tensor:
    """Gram-Schmidt in fp64, twice, keeping the order; dependent vectors raise."""
    basis: list[Tensor] = []
    for i, vector in enumerate(stack.double()):
        rest = vector.clone()
        for _ in range(2):
            for b in basis:
                rest = rest - (rest @ b) * b
        norm = float(rest.norm())
        if norm < 1e-5 * float(vector.norm()):
            raise ValueError(f"{what}: vector {i} lies in the span of the ones before it")
        basis.append(rest / norm)
    return torch.stack(basis)


def _finite(value: float, what: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}")
    return number
