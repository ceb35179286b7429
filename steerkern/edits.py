"""Edits: maps on the coordinates of a residual row.

Every edit known to the literature changes a row ``h [H]`` along a few directions only::

    a_e = <h, v_e>        h += sum_e (a'_e - a_e) * v_e

so an :class:`Edit` is a set of directions and, per direction, the four numbers of the map
``a' = clamp((1 - beta) * a + alpha, lo, hi)`` (or a rotation of a pair). The constructors below are the vocabulary.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Union

import torch
from torch import Tensor

from .artifacts import Fingerprint
from .directions import Direction, Directions, check_layer, check_vector
from .ops.schemas import MAX_ENTRIES
from .vectors import UNIT_TOLERANCE, Vector, check_unit, finite, interval, orthonormal, stack_of, unit_rows

Several = Union[Vector, Sequence[Vector]]
Source = Union[Several, Mapping[int, Several]]
"""One vector or several (a tensor ``[k, H]`` is several) for every layer, or the same per layer: a mapping such as
:class:`~steerkern.directions.Directions`."""

_INF = math.inf
_FIXED: dict[str, dict[str, float]] = {
    "add": {"beta": 0.0, "lo": -_INF, "hi": _INF},
    "ablate": {"alpha": 0.0, "lo": -_INF, "hi": _INF},
    "clamp": {"beta": 1.0, "lo": -_INF, "hi": _INF},
    "cap": {"alpha": 0.0, "beta": 0.0},
    "rotate": {"beta": 0.0, "lo": -_INF, "hi": _INF},
    "probe": {"alpha": 0.0, "beta": 0.0, "lo": -_INF, "hi": _INF},
}
KINDS = tuple(_FIXED)
MAP = ("alpha", "beta", "lo", "hi")


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

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or self.vectors.dtype != torch.float32:
            raise ValueError(f"vectors must be float32 [k, H], got {self.vectors.dtype} {list(self.vectors.shape)}")
        k = len(self.vectors)
        if not 1 <= k <= MAX_ENTRIES:
            raise ValueError(f"an edit takes 1 to {MAX_ENTRIES} vectors, got {k}")
        for i, vector in enumerate(self.vectors):
            check_vector(vector, f"vector {i}")
        for name in ("norms", *MAP):
            if len(getattr(self, name)) != k:
                raise ValueError(f"{k} vectors need {k} {name}, got {len(getattr(self, name))}")
        for name in ("norms", "alpha", "beta"):
            for x in getattr(self, name):
                finite(x, name, nonzero=name == "norms")


@dataclass(frozen=True, eq=False)
class Gate:
    """Open where the coordinate (or the cosine) of the row along ``unit [H]`` lies in ``[lo, hi]``."""

    unit: Tensor
    lo: float
    hi: float
    cosine: bool

    def __post_init__(self) -> None:
        interval(self.lo, self.hi, "gate")
        if self.cosine and (self.lo > 1.0 or self.hi < -1.0 or (self.lo <= -1.0 and self.hi >= 1.0)):
            raise ValueError(f"a cosine lies in [-1, 1]: the gate [{self.lo}, {self.hi}] never opens or never closes")
        check_unit(check_vector(self.unit, "gate direction")[None], "gate direction")


@dataclass(frozen=True, eq=False)
class Edit:
    """A map on coordinates, per layer (key ``None``: the same at every layer); made by :func:`add` and its siblings.

    ``orthonormalised`` says that the given vectors were replaced by an orthonormal basis of their span.

    Raises:
        ValueError: a map that is not of this kind, vectors that are not unit where the kind needs that, or parts that
            differ in width or model.
    """

    kind: str
    rows: Mapping[int | None, Rows]
    gate: Gate | None = None
    model: Fingerprint | None = None
    orthonormalised: bool = False
    site: str | None = None
    """Site of the :class:`Directions` that gave each layer its vector; a plan for another site refuses them."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {reprlib.repr(self.kind)}")
        if not self.rows or (None in self.rows and len(self.rows) > 1):
            raise ValueError(f"{self.kind} needs one set of vectors for any layer, or one per layer")
        shapes = {tuple(rows.vectors.shape) for rows in self.rows.values()}
        if len(shapes) > 1:
            raise ValueError(f"{self.kind} needs vectors of one shape at every layer, got {sorted(shapes)}")
        for layer, rows in self.rows.items():
            _check_map(self.kind, rows, self.kind if layer is None else f"{self.kind} at layer {check_layer(layer)}")
        if self.model is not None and self.model.width != self.width:
            raise ValueError(f"{self.kind} vectors have width {self.width}, the model is {self.model}")
        if self.gate is not None and self.gate.unit.numel() != self.width:
            raise ValueError(f"gate has width {self.gate.unit.numel()}, the edit has {self.width}")

    @property
    def width(self) -> int:
        """Width ``H`` of the directions."""
        return next(iter(self.rows.values())).vectors.shape[1]

    @property
    def rank(self) -> int:
        """Directions per layer."""
        return next(iter(self.rows.values())).vectors.shape[0]

    @property
    def entries(self) -> int:
        """Table entries per layer: the directions and the gate's."""
        return self.rank + (self.gate is not None)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layers that have their own vectors, or None if one set serves all."""
        return None if None in self.rows else tuple(sorted(k for k in self.rows if k is not None))

    def when(self, condition: Vector, lo: float = -_INF, hi: float = _INF, *, cosine: bool = False) -> Edit:
        """Let the edit act only on rows whose coordinate along ``condition [H]`` lies in ``[lo, hi]``.

        The coordinate is ``<h, c/|c|>`` in residual units; with ``cosine`` it is divided by ``|h|``.
        The condition reads the row as it arrived (CAST, arXiv 2409.05907, in its row-local form).

        Raises:
            ValueError: an interval that is empty or that bounds nothing, a condition of another width or model, or an
                edit that has a gate already.
        """
        if self.gate is not None:
            raise ValueError(f"{self.kind} has a gate already: an edit takes one")
        low, high = interval(lo, hi, "gate")
        unit = unit_rows(stack_of((condition,), "gate direction"))[0].float()
        return replace(self, gate=Gate(unit, low, high, bool(cosine)), model=_model([self, condition], "gate and edit"))


def add(source: Source, coefficient: float = 1.0) -> Edit:
    """``h + coefficient * v``: CAA (arXiv 2312.06681), ActAdd (2308.10248), control vectors.

    ``v`` is the raw vector: a tensor as given, a :class:`Direction` times its norm (``direction.unit`` adds the unit
    vector). Several vectors are added together.

    Raises:
        TypeError: something else than tensors or Directions.
        ValueError: NaN, Inf, zero norm, widths or models that differ, more than 64 vectors, a coefficient of 0.

    >>> import torch
    >>> add(torch.ones(4), 0.5).kind
    'add'
    """
    return _edit("add", source, alpha=finite(coefficient, "coefficient", nonzero=True))


def ablate(source: Source, amount: float = 1.0) -> Edit:
    r"""``h - amount * V^T V h``: directional ablation (arXiv 2406.11717); ``amount`` below 1 removes a part.

    Several vectors are orthonormalised and removed as a subspace.

    Raises:
        TypeError, ValueError: as for :func:`add`; also a vector in the span of the ones before it.
    """
    return _edit("ablate", source, beta=finite(amount, "amount", nonzero=True))


def clamp(source: Source, target: float) -> Edit:
    """Set the coordinate along the unit direction to ``target`` (residual units); a mean's target is affine ablation.

    Several directions act simultaneously: they reach the target where they are orthogonal.

    Raises:
        TypeError, ValueError: as for :func:`add`.
    """
    return _edit("clamp", source, alpha=finite(target, "target"), beta=1.0)


def cap(source: Source, lo: float = -_INF, hi: float = _INF) -> Edit:
    """Keep the coordinate along the unit direction inside ``[lo, hi]``; rows inside keep their bits.

    Raises:
        TypeError, ValueError: as for :func:`add`; also an interval that is empty or that bounds nothing.
    """
    low, high = interval(lo, hi, "cap")
    return _edit("cap", source, lo=low, hi=high)


def rotate(first: Vector, second: Vector, degrees: float) -> Edit:
    """Turn the part of the row in the plane of two vectors to the angle ``degrees`` from the first; norms are kept.

    ``b1`` is the first vector's unit, ``b2`` the second's part orthogonal to it; ``|P h|`` stays
    (Angular Steering, arXiv 2510.26243: an absolute target angle).

    Raises:
        TypeError, ValueError: as for :func:`add`; also two vectors that span no plane.
    """
    angle = math.radians(finite(degrees, "degrees"))
    return _edit("rotate", (first, second), alpha=(math.cos(angle), math.sin(angle)))


def probe(source: Source) -> Edit:
    """Read the coordinates along unit directions without changing the row.

    Raises:
        TypeError, ValueError: as for :func:`add`.
    """
    return _edit("probe", source)


def _edit(
    kind: str,
    source: Source,
    *,
    alpha: float | tuple[float, ...] = 0.0,
    beta: float = 0.0,
    lo: float = -_INF,
    hi: float = _INF,
) -> Edit:
    given = _by_layer(source, kind)
    rows: dict[int | None, Rows] = {}
    several = False
    for layer, vectors in given.items():
        where = kind if layer is None else f"{kind} at layer {layer}"
        stack = stack_of(vectors, f"{where}: vector")
        norms = stack.double().norm(dim=1)
        k = len(stack)
        several = k > 1
        if kind in ("ablate", "rotate") and several:
            stack = orthonormal(stack, where).float()
        elif kind != "add":
            stack = unit_rows(stack).float()
        alphas = alpha if isinstance(alpha, tuple) else (alpha,) * k
        rows[layer] = Rows(stack, tuple(norms.tolist()), alphas, (beta,) * k, (lo,) * k, (hi,) * k)
    model = _model([v for vectors in given.values() for v in vectors], f"{kind} vectors")
    site = source.site if isinstance(source, Directions) else None
    return Edit(kind, rows, None, model, several and kind in ("ablate", "rotate"), site)


def _by_layer(source: Source, kind: str) -> dict[int | None, Sequence[Vector]]:
    if not isinstance(source, Mapping):
        return {None: _several(source, kind)}
    if not source:
        raise ValueError(f"{kind} needs at least one layer, got an empty mapping")
    return {check_layer(layer): _several(vectors, f"{kind} at layer {layer}") for layer, vectors in source.items()}


def _several(source: Several, what: str) -> Sequence[Vector]:
    if isinstance(source, Direction):
        return (source,)
    if isinstance(source, Tensor):
        return source.unbind() if source.dim() == 2 else (source,)
    if isinstance(source, (list, tuple)):
        return source
    raise TypeError(f"{what} takes tensors, Directions or a mapping of layers, got {type(source).__name__}")


def _model(parts: Sequence[Edit | Vector], what: str) -> Fingerprint | None:
    """The one model that the parts come from, where any says so."""
    models = {part.model for part in parts if not isinstance(part, Tensor)} - {None}
    if len(models) > 1:
        raise ValueError(f"{what} come from different models: {', '.join(sorted(map(str, models)))}")
    return models.pop() if models else None


def _check_map(kind: str, rows: Rows, where: str) -> None:
    """Raise unless the numbers are a map of this kind on vectors of this kind."""
    for name, value in _FIXED[kind].items():
        if any(x != value for x in getattr(rows, name)):
            raise ValueError(f"{where} needs {name} {value}, got {reprlib.repr(getattr(rows, name))}")
    if kind == "cap":
        for lo, hi in zip(rows.lo, rows.hi, strict=True):
            interval(lo, hi, where)
    if kind == "add":
        return
    check_unit(rows.vectors, f"{where}: vectors")
    if kind in ("ablate", "rotate"):
        wide = rows.vectors.double()
        if bool((wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max() > UNIT_TOLERANCE):
            raise ValueError(f"{where} needs orthogonal vectors")
    if kind == "rotate":
        if len(rows.vectors) != 2:
            raise ValueError(f"{where} needs two vectors, got {len(rows.vectors)}")
        if abs(math.hypot(*rows.alpha) - 1) > UNIT_TOLERANCE:
            raise ValueError(f"{where} needs the cosine and sine of an angle, got {rows.alpha}")
