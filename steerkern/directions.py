"""Directions: one vector per layer with its raw norm, its site and where it came from."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .artifacts import (
    Fingerprint,
    check_name,
    expect,
    fingerprint_from_json,
    fingerprint_to_json,
    read_folder,
    take,
    write_folder,
)
from .errors import ArtifactError

SITES = ("resid_pre", "resid_mid", "resid_post")
"""Residual sites by their interpretability names; ``resid_post[l]`` is the same tensor as ``resid_pre[l + 1]``."""


def check_vector(vector: object, what: str) -> Tensor:
    """Return ``vector [H]`` as a float32 CPU copy; NaN, Inf and zero norm raise ValueError."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(vector).__name__}")
    if vector.dim() != 1 or vector.numel() == 0 or not vector.is_floating_point():
        raise ValueError(f"{what} must be a float vector [H], got {vector.dtype} {list(vector.shape)}")
    vector = vector.detach().to("cpu", torch.float32, copy=True)
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{what} holds NaN or Inf")
    if float(vector.double().norm()) == 0.0:
        raise ValueError(f"{what} has norm 0")
    return vector


def check_layer(layer: object) -> int:
    """Return ``layer`` if it is a whole number from 0, else raise ValueError."""
    if type(layer) is not int or layer < 0:
        raise ValueError(f"layer must be a whole number from 0, got {reprlib.repr(layer)}")
    return layer


def check_site(site: object) -> str:
    """Return ``site`` if it is one of :data:`SITES`, else raise ValueError."""
    if not isinstance(site, str) or site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {reprlib.repr(site)}")
    return site


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector of the residual stream at one layer; ``raw [H]`` is what difference-of-means methods add.

    Raises:
        TypeError: ``raw`` is not a tensor.
        ValueError: NaN, Inf, zero norm, an unknown site, a negative layer, or a width that is not the model's.
    """

    raw: Tensor
    layer: int
    site: str = "resid_pre"
    model: Fingerprint | None = None

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_site(self.site)
        object.__setattr__(self, "raw", check_vector(self.raw, f"direction of layer {self.layer}"))
        if self.model is not None and self.model.width != self.raw.numel():
            raise ValueError(f"direction of layer {self.layer} has width {self.raw.numel()}, the model is {self.model}")

    @property
    def norm(self) -> float:
        """Norm of ``raw``, in residual units."""
        return float(self.raw.double().norm())

    @property
    def unit(self) -> Tensor:
        """``raw / |raw|``, ``[H]`` float32."""
        return (self.raw.double() / self.norm).float()


@dataclass(frozen=True, eq=False)
class Directions(Mapping[int, Direction]):
    """A :class:`Direction` per layer, with the record of how they were made.

    >>> import torch
    >>> directions = Directions.of({0: torch.tensor([3.0, 4.0])}, name="toy")
    >>> directions[0].norm
    5.0

    Raises:
        TypeError: something else than a :class:`Direction`.
        ValueError: no direction, widths that differ, a direction of another layer, site or model, or provenance that
            is not JSON.
    """

    by_layer: Mapping[int, Direction]
    site: str = "resid_pre"
    name: str = "directions"
    model: Fingerprint | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        check_site(self.site)
        if not self.by_layer:
            raise ValueError("directions need at least one layer, got none")
        for layer, one in self.by_layer.items():
            if not isinstance(one, Direction):
                raise TypeError(f"layer {layer} must be a Direction, got {type(one).__name__}; see Directions.of")
            if (one.layer, one.site, one.model) != (layer, self.site, self.model):
                raise ValueError(f"layer {layer}: got the direction of {one.site}[{one.layer}], model {one.model}")
        widths = {one.raw.numel() for one in self.by_layer.values()}
        if len(widths) > 1:
            raise ValueError(f"directions must have one width, got {sorted(widths)}")
        try:
            record = json.loads(json.dumps(dict(self.provenance), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"provenance must be JSON: {error}") from None
        object.__setattr__(self, "by_layer", dict(sorted(self.by_layer.items())))
        object.__setattr__(self, "provenance", record)

    @staticmethod
    def of(
        vectors: Mapping[int, Tensor],
        site: str = "resid_pre",
        name: str = "directions",
        model: Fingerprint | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Directions:
        """Build from raw vectors ``{layer: [H]}``.

        Raises:
            TypeError: a vector that is not a tensor.
            ValueError: no vector, widths that differ, NaN, Inf, zero norm, an unknown site or a negative layer.
        """
        made = {layer: Direction(vector, layer, site, model) for layer, vector in vectors.items()}
        return Directions(made, site, name, model, provenance or {})

    def __getitem__(self, layer: int) -> Direction:
        try:
            return self.by_layer[layer]
        except KeyError:
            raise KeyError(f"layer {layer}: {self.name!r} has layers {list(self.by_layer)}") from None

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    @property
    def width(self) -> int:
        """Width ``H`` of every vector."""
        return next(iter(self.by_layer.values())).raw.numel()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``directions.json`` and ``directions.safetensors`` (raw rows ``[layers, H]``).

        Raises:
            ArtifactError: the folder cannot be written, or the directions are over a limit of the format.
        """
        header = {
            "name": self.name,
            "site": self.site,
            "layers": list(self),
            "model": fingerprint_to_json(self.model),
            "provenance": self.provenance,
        }
        write_folder(folder, "directions", header, {"raw": torch.stack([d.raw for d in self.values()])})

    @staticmethod
    def from_pretrained(source: str | os.PathLike[str]) -> Directions:
        """Read a folder or hub id that :meth:`save_pretrained` wrote.

        Raises:
            ArtifactError: naming the file and what is wrong with it.
        """
        header, tensors = read_folder(source, "directions")
        try:
            take(header, "the file", ("name", "site", "layers", "model", "provenance"))
            layers = [check_layer(layer) for layer in expect(header["layers"], list, "layers")]
            raw = tensors.get("raw")
            if raw is None or raw.dim() != 2 or len(layers) != raw.shape[0]:
                seen = "none" if raw is None else list(raw.shape)
                raise ValueError(f"{len(layers)} layers need a tensor 'raw' of {len(layers)} rows, got {seen}")
            if len(set(layers)) < len(layers):
                raise ValueError(f"layers must be listed once, got {reprlib.repr(layers)}")
            return Directions.of(
                dict(zip(layers, raw, strict=True)),
                header["site"],
                header["name"],
                fingerprint_from_json(header["model"]),
                expect(header["provenance"], dict, "provenance"),
            )
        except ValueError as error:
            raise ArtifactError(f"directions.json: {error}") from None
