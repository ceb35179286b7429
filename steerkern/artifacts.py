"""Folders of one JSON file and one safetensors file: the only form in which steerkern stores anything.

Everything read is bounded and checked before it is used; pickle is never opened.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ArtifactError

MAX_JSON_BYTES = 4 << 20
MAX_TENSOR_BYTES = 1 << 30
MAX_TENSORS = 4096
MAX_WIDTH = 1 << 17
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,127}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Fingerprint(NamedTuple):
    """The facts of a model that a vector depends on."""

    model_type: str
    width: int
    layers: int

    def __str__(self) -> str:
        return f"{self.model_type} ({self.layers} layers, width {self.width})"


def check_name(name: object, what: str) -> str:
    """Return ``name`` if it can name a plan or a file, else raise ValueError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{what} must be 1 to 128 letters, digits, spaces or ._+-, got {name!r}")
    return name


def fingerprint_to_json(model: Fingerprint | None) -> list[Any] | None:
    return None if model is None else list(model)


def fingerprint_from_json(value: Any) -> Fingerprint | None:
    if value is None:
        return None
    if not (
        isinstance(value, list)
        and len(value) == 3
        and isinstance(value[0], str)
        and all(type(n) is int and n > 0 for n in value[1:])
    ):
        raise ArtifactError(f"model must be [type, width, layers], got {value!r}")
    return Fingerprint(*value)


def write_folder(folder: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``KIND.json`` and ``directions.safetensors``; each file appears whole or not at all."""
    from safetensors.torch import save_file

    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": f"steerkern.{kind}", "version": 1, **header}, indent=1)
        with tempfile.TemporaryDirectory(dir=path, prefix=".writing-") as scratch:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, f"{scratch}/tensors")
            Path(scratch, "json").write_text(text + "\n", encoding="utf-8")
            os.replace(f"{scratch}/tensors", path / "directions.safetensors")
            os.replace(f"{scratch}/json", path / f"{kind}.json")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None


def read_folder(source: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_folder` wrote, from a local folder or a Hugging Face hub id.

    Raises:
        ArtifactError: not a folder of this kind, another version, over a limit, or not finite float32 rows.
    """
    folder = _local(source, kind)
    header = _read_json(folder / f"{kind}.json", kind)
    return header, _read_tensors(folder / "directions.safetensors")


def _local(source: str | os.PathLike[str], kind: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ArtifactError(f"{path} is a file; steerkern reads a folder with {kind}.json and directions.safetensors")
    if not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
        raise ArtifactError(f"no folder {path}, and {str(source)!r} is not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[f"{kind}.json", "directions.safetensors"]))
    except Exception as error:
        raise ArtifactError(f"no folder {path}, and the hub gave no {source!r}: {type(error).__name__}") from error


def _bounded(path: Path, limit: int) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path.parent} has no {path.name}")
    size = path.stat().st_size
    if size > limit:
        raise ArtifactError(f"{path.name} is {size} bytes, allowed are {limit}")


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    _bounded(path, MAX_JSON_BYTES)
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != f"steerkern.{kind}":
        raise ArtifactError(f"{path.name} is not a steerkern.{kind} file")
    if header.get("version") != 1:
        raise ArtifactError(f"{path.name} has format version {header.get('version')!r}, this steerkern reads 1")
    return header


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _bounded(path, MAX_TENSOR_BYTES)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path.name} is not a well-formed safetensors file: {error}") from None
    if len(tensors) > MAX_TENSORS:
        raise ArtifactError(f"{path.name} holds {len(tensors)} tensors, allowed are {MAX_TENSORS}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not 1 <= tensor.dim() <= 2 or not 1 <= tensor.shape[-1] <= MAX_WIDTH:
            raise ArtifactError(
                f"{path.name}: {name!r} must be float32 of 1 or 2 dimensions up to width {MAX_WIDTH}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{path.name}: {name!r} holds NaN or Inf")
    return tensors
