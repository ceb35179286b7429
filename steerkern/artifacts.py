"""Folders of one JSON file and one safetensors file: the only form in which steerkern stores anything.

Everything read is bounded and checked before it is used; pickle is never opened. The JSON file carries the SHA-256 of
the tensors, so the halves of two artefacts are never read as one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from .errors import ArtifactError

TENSORS = "directions.safetensors"
VERSION = 1
MAX_JSON_BYTES = 4 << 20
MAX_TENSOR_BYTES = 1 << 30
MAX_TENSORS = 4096
MAX_WIDTH = 1 << 17
MAX_LAYERS = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,127}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WORDS = {list: "a list", dict: "an object", bool: "true or false", str: "a string"}
_T = TypeVar("_T", list[Any], dict[str, Any], bool, str)


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
        raise ValueError(f"{what} must be 1 to 128 letters, digits, spaces or ._+-, got {reprlib.repr(name)}")
    return name


def expect(value: object, kind: type[_T], what: str) -> _T:
    """Return a JSON value if it is of this type, else raise ValueError."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} must be {_WORDS[kind]}, got {reprlib.repr(value)}")
    return value


def take(record: object, what: str, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Return a JSON object if it has these keys and no others, else raise ValueError.

    An unknown key may be a gate that is spelt wrong: reading on without it would steer rows that were to be left alone.
    """
    found = expect(record, dict, what)
    for key in keys:
        if key not in found:
            raise ValueError(f"{what} has no {key!r}")
    for key in found:
        if key not in keys and key not in optional:
            known = ", ".join((*keys, *optional))
            raise ValueError(f"{what} has the unknown key {reprlib.repr(key)}; known are {known}")
    return found


def fingerprint_to_json(model: Fingerprint | None) -> list[Any] | None:
    """``[type, width, layers]``, or None."""
    return None if model is None else list(model)


def fingerprint_from_json(value: object) -> Fingerprint | None:
    """Read what :func:`fingerprint_to_json` wrote; anything else raises ValueError."""
    if value is None:
        return None
    if isinstance(value, list) and [type(v) for v in value] == [str, int, int]:
        model = Fingerprint(*value)
        named = len(model.model_type) <= 128 and model.model_type.isprintable()
        if named and 0 < model.width <= MAX_WIDTH and 0 < model.layers <= MAX_LAYERS:
            return model
    raise ValueError(f"model must be [type, width, layers] or null, got {reprlib.repr(value)}")


def write_folder(
    folder: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write ``KIND.json`` and ``directions.safetensors``: both, or nothing has changed.

    Raises:
        ArtifactError: something that :func:`read_folder` would refuse, or a folder that cannot be written.
    """
    from safetensors.torch import save

    _check_tensors(tensors)
    # cloned: safetensors refuses tensors that share memory, as views of one stack do
    data = save({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()})
    whole = {"format": f"steerkern.{kind}", "version": VERSION, "sha256": hashlib.sha256(data).hexdigest(), **header}
    text = (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()
    _check_size(TENSORS, len(data), MAX_TENSOR_BYTES)
    _check_size(f"{kind}.json", len(text), MAX_JSON_BYTES)
    path = Path(folder)
    made: list[Path] = []
    try:
        made = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path, prefix=".writing-") as scratch:
            _put(path, Path(scratch), {TENSORS: data, f"{kind}.json": text})
    except BaseException as error:
        for p in made:
            with contextlib.suppress(OSError):
                p.rmdir()
        if isinstance(error, OSError):
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None
        raise


def _put(path: Path, scratch: Path, files: Mapping[str, bytes]) -> None:
    """Move all files into place, or on any exception leave the old ones there."""
    for name, data in files.items():
        (scratch / name).write_bytes(data)
    try:
        for name in files:
            if (path / name).is_file():
                os.replace(path / name, scratch / f"{name}.old")
        for name in files:
            os.replace(scratch / name, path / name)
    except BaseException:
        for name in files:
            if not (scratch / name).exists():
                (path / name).unlink(missing_ok=True)
            if (scratch / f"{name}.old").exists():
                os.replace(scratch / f"{name}.old", path / name)
        raise


def read_folder(source: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_folder` wrote, from a local folder or a Hugging Face hub id: its header and tensors.

    Raises:
        ArtifactError: not a folder of this kind, another version, over a limit, damaged, or not finite float32 rows.
    """
    folder = _local(source, kind)
    header = _read_json(folder / f"{kind}.json", kind)
    return header, _read_tensors(folder / TENSORS, header.pop("sha256", None), f"{kind}.json")


def _local(source: str | os.PathLike[str], kind: str) -> Path:
    path = Path(source)
    shown = repr(os.fspath(source))
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise ArtifactError(f"{shown} is a file; steerkern reads a folder with {kind}.json and {TENSORS}")
    except OSError as error:
        raise ArtifactError(f"cannot read {shown}: {error.strerror or error}") from None
    if not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
        raise ArtifactError(f"no folder {shown}, and it is not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[f"{kind}.json", TENSORS]))
    except Exception as error:
        raise ArtifactError(f"no folder {shown}, and the hub gave none by that id: {type(error).__name__}") from error


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ArtifactError(f"{name} is {size} bytes, allowed are {limit}")


def _read(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():
            raise ArtifactError(f"{path.parent} has no {path.name}")
        size = path.stat().st_size
        _check_size(path.name, size, limit)
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from None


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    data = _read(path, MAX_JSON_BYTES)
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(header, dict) or header.pop("format", None) != f"steerkern.{kind}":
        raise ArtifactError(f"{path.name} is not a steerkern.{kind} file")
    version = header.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"{path.name} has format version {reprlib.repr(version)}, this steerkern reads version {VERSION}"
        )
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} stands twice in one object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _read_tensors(path: Path, digest: object, header: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read(path, MAX_TENSOR_BYTES)
    seen = hashlib.sha256(data).hexdigest()
    if digest != seen:
        raise ArtifactError(
            f"{path.name} is damaged or belongs to another {header}: "
            f"its sha256 is '{seen[:12]}...', {header} says {reprlib.repr(digest)}"
        )
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"{path.name} is not a well-formed safetensors file: {error}") from None
    _check_tensors(tensors)
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise ArtifactError(f"{TENSORS} holds {len(tensors)} tensors, allowed are {MAX_TENSORS}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not 1 <= tensor.dim() <= 2 or not 1 <= tensor.shape[-1] <= MAX_WIDTH:
            raise ArtifactError(
                f"{TENSORS}: {reprlib.repr(name)} must be float32 of 1 or 2 dimensions up to width {MAX_WIDTH}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{TENSORS}: {reprlib.repr(name)} holds NaN or Inf")
