"""Directions: one vector per layer with its raw norm, its site and where it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .artifacts import (
    Fingerprint,
    check_name,
    fingerprint_from_json,
    fingerprint_to_json,
    read_folder,
    write_folder,
)
from .errors import ArtifactError

SITES = ("resid_pre", "resid_mid", "resid_post")
"""Residual sites by their interpretability names; ``resid_post[l]`` is the same tensor as ``resid_pre[l + 1]``."""


def check_vector(vector: Tensor, what: str) -> Tensor:
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


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector of the residual stream at one layer; ``raw [H]`` is what difference-of-means methods add."""

    raw: Tensor
    layer: int
    site: str = "resid_pre"
    model: Fingerprint | None = None

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
    """

    by_layer: Mapping[int, Direction]
    site: str = "resid_pre"
    name: str = "directions"
    model: Fingerprint | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

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
            ValueError: no vector, widths that differ, NaN, Inf, zero norm, an unknown site or a negative layer.
        """
        check_name(name, "name")
        if site not in SITES:
            raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}")
        if not vectors:
            raise ValueError("directions need at least one layer, got none")
        for layer in vectors:
            if type(layer) is not int or layer < 0:
                raise ValueError(f"layer must be a number from 0, got {layer!r}")
        made = {
            layer: Direction(check_vector(vectors[layer], f"direction of layer {layer}"), layer, site, model)
            for layer in sorted(vectors)
        }
        widths = {d.raw.numel() for d in made.values()}
        if len(widths) > 1:
            raise ValueError(f"directions must have one width, got {sorted(widths)}")
        if model is not None and widths != {model.width}:
            raise ValueError(f"directions have width {widths.pop()}, the model is {model}")
        return Directions(made, site, name, model, dict(provenance or {}))

    def __getitem__(self, layer: int) -> Direction:
        try:
            return self.by_layer[layer]
        except KeyError:
            raise KeyError(f"layer {layer}: {self.name!r} has layers {min(self.by_layer)}..{max(self.by_layer)}") from None

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    @property
    def width(self) -> int:
        """Width ``H`` of every vector."""
        return next(iter(self.by_layer.values())).raw.numel()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``directions.json`` and ``directions.safetensors`` (raw rows ``[layers, H]``)."""
        header = {
            "name": self.name,
            "site": self.site,
            "layers": list(self),
            "model": fingerprint_to_json(self.model),
            "provenance": dict(self.provenance),
        }
        write_folder(folder, "directions", header, {"raw": torch.stack([d.raw for d in self.values()])})

    @staticmethod
    def from_pretrained(source: str | os.PathLike[str]) -> Directions:
        """Read a folder or hub id that :meth:`save_pretrained` wrote.

        Raises:
            ArtifactError: naming the file and what is wrong with it.
        """
        header, tensors = read_folder(source, "directions")
        layers, raw = header.get("layers"), tensors.get("raw")
        if not isinstance(layers, list) or raw is None or raw.dim() != 2 or len(layers) != raw.shape[0]:
            raise ArtifactError("directions.json must list one layer per row of the tensor 'raw'")
        if len(set(map(str, layers))) != len(layers):
            raise ArtifactError("directions.json lists a layer twice")
        provenance = header.get("provenance", {})
        if not isinstance(provenance, dict):
            raise ArtifactError(f"provenance must be an object, got {type(provenance).__name__}")
        try:
            return Directions.of(
                dict(zip(layers, raw, strict=True)),
                header.get("site", "resid_pre"),
                header.get("name", "directions"),
                fingerprint_from_json(header.get("model")),
                provenance,
            )
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"directions.json: {error}") from None
