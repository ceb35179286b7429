"""Control vectors of llama.cpp and repeng: GGUF files with a tensor ``direction.N`` per block.

``direction.N [H]`` float32 is added to the output of block ``N``, counted from 0: the site ``resid_post[N]``. Block 0
has no tensor; llama.cpp refuses a file with ``direction.0`` (``common_control_vector_load_one`` in
``common/common.cpp``, ``llama_adapter_cvec`` in ``src/llama-adapter.cpp``, ``ControlVector.export_gguf`` in repeng).
"""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..artifacts import MAX_LAYERS, MAX_TENSOR_BYTES, MAX_TENSORS, MAX_WIDTH, check_name
from ..directions import Direction, Directions
from ..errors import ArtifactError, BackendError

ARCHITECTURE = "controlvector"
MAX_KEYS = 1024
MAX_STRING = 1 << 16
MAX_ITEMS = 1 << 16
"""Items of all arrays of a file together; control vectors have none, and the library makes an object of each."""

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a GGUF value type -> its bytes."""
_STRING, _ARRAY = 8, 9
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


def read_gguf(path: str | os.PathLike[str]) -> Directions:
    """Read a control vector: ``direction.N`` becomes layer ``N`` at site ``resid_post``, to the bit.

    A direction of zeros, which adds nothing, is left out. The file does not say which model it is of beyond a hint,
    which goes into ``provenance["model_hint"]``. Steer with ``Plan(add(read_gguf(path)), site="resid_post")``.

    Raises:
        ArtifactError: not a control vector, truncated, damaged or over a limit.
        BackendError: the package ``gguf`` is missing.
    """
    gguf = _library()
    file = Path(path)
    _check_header(file)
    try:
        reader = gguf.GGUFReader(file)
        architecture, hint, name = (
            _text(reader, key) for key in ("general.architecture", f"{ARCHITECTURE}.model_hint", "general.name")
        )
        tensors = [(t.name, t.tensor_type, t.shape.tolist(), torch.from_numpy(t.data.copy())) for t in reader.tensors]
    except Exception as error:  # the library's own, of any kind
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ArtifactError(f"{file.name} is not a well-formed GGUF file: {reason}") from None
    if architecture != ARCHITECTURE:
        raise ArtifactError(f"{file.name} holds {reprlib.repr(architecture)}, a control vector holds {ARCHITECTURE!r}")
    try:
        vectors: dict[int, Tensor] = {}
        for key, kind, shape, vector in tensors:
            layer = _layer(key)
            if kind != gguf.GGMLQuantizationType.F32 or len(shape) != 1 or not 1 <= shape[0] <= MAX_WIDTH:
                raise ValueError(f"{key} must be F32 [H], H up to {MAX_WIDTH}, got {kind.name} {reprlib.repr(shape)}")
            if bool((vector != 0).any()):
                vectors[layer] = vector
        provenance = {"format": "gguf", "model_hint": hint}
        return Directions.of(vectors, "resid_post", _named(name, file.stem), provenance=provenance)
    except ValueError as error:
        raise ArtifactError(f"{file.name}: {error}") from None


def write_gguf(directions: Directions, path: str | os.PathLike[str], *, layers: Iterable[int] | None = None) -> None:
    """Write a control vector that llama.cpp and repeng read; the raw vectors are kept to the bit.

    Directions at ``resid_pre`` are written as the block outputs that they are, see :func:`as_resid_post`. Name and
    model type are kept; layer count of the model and provenance have no place in the format.

    Args:
        directions: at ``resid_post`` or ``resid_pre``.
        path: the file to write; one that exists is replaced, or on an error left as it was.
        layers: which of them to write, numbered as in ``directions``; by default all.

    Raises:
        ArtifactError: the output of block 0 or the embedding, which the format cannot hold, a site that is no block
            output, a layer that is not there, or a file that cannot be written.
        BackendError: the package ``gguf`` is missing.
    """
    gguf = _library()
    file = Path(path)
    chosen = as_resid_post(directions if layers is None else _only(directions, layers))
    if 0 in chosen:
        raise ArtifactError(
            f"the output of block 0 ({directions.site}[{int(directions.site == 'resid_pre')}]) has no place in a GGUF "
            "control vector, which starts at block 1; leave that layer out"
        )
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".writing-") as scratch:
            whole = Path(scratch) / "vector.gguf"
            writer = gguf.GGUFWriter(whole, ARCHITECTURE)
            writer.add_string("general.name", chosen.name)
            writer.add_string(f"{ARCHITECTURE}.model_hint", _hint(chosen))
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(chosen))
            for layer, direction in chosen.items():
                writer.add_tensor(f"direction.{layer}", direction.raw.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(whole, file)
    except OSError as error:
        raise ArtifactError(f"cannot write {file}: {error.strerror or error}") from None


def as_resid_post(directions: Directions) -> Directions:
    """The same directions as outputs of blocks: ``resid_pre[l]`` is ``resid_post[l - 1]``, the same tensor.

    Raises:
        ArtifactError: ``resid_pre[0]``, which no block puts out, or another site.

    >>> import torch
    >>> list(as_resid_post(Directions.of({4: torch.ones(8)}, "resid_pre")))
    [3]
    """
    if directions.site == "resid_post":
        return directions
    if directions.site != "resid_pre":
        raise ArtifactError(f"control vectors are added to block outputs, these directions are of {directions.site}")
    if 0 in directions:
        raise ArtifactError("resid_pre[0] is the embedding, no block's output; leave layer 0 out")
    raw = {layer - 1: direction.raw for layer, direction in directions.items()}
    return Directions.of(raw, "resid_post", directions.name, directions.model, directions.provenance)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise BackendError("GGUF files need the package gguf: pip install 'steerkern[gguf]'") from None
    return gguf


def _only(directions: Directions, layers: Iterable[int]) -> Directions:
    chosen: dict[int, Direction] = {}
    for layer in layers:
        if layer not in directions:
            raise ArtifactError(f"layer {layer}: {directions.name!r} has layers {list(directions)}")
        chosen[layer] = directions[layer]
    if not chosen:
        raise ArtifactError("layers must name at least one layer, got none")
    return Directions(chosen, directions.site, directions.name, directions.model, directions.provenance)


def _hint(directions: Directions) -> str:
    hint = directions.provenance.get("model_hint") if directions.model is None else directions.model.model_type
    return hint if isinstance(hint, str) and hint.isprintable() and len(hint) <= 128 else "unknown"


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    value = None if field is None else field.contents()
    return value if isinstance(value, str) else None


def _named(*candidates: str | None) -> str:
    for candidate in candidates:
        with contextlib.suppress(ValueError):
            return check_name(candidate, "name")
    return "control-vector"


def _layer(key: str) -> int:
    match = _DIRECTION.fullmatch(key)
    if match is None:
        raise ValueError(f"tensors must be named direction.N, got {reprlib.repr(key)}")
    layer = int(match[1])
    if not 0 < layer < MAX_LAYERS:
        raise ValueError(f"{key}: control vectors start at block 1 and end before {MAX_LAYERS}")
    return layer


# the library follows every count and length it reads, so these are checked before it sees the file


def _check_header(file: Path) -> None:
    """Raise ArtifactError unless what the library loops over is bounded and inside the file."""
    try:
        if not file.is_file():
            raise ArtifactError(f"no file {str(file)!r}")
        size = file.stat().st_size
        if size > MAX_TENSOR_BYTES:
            raise ArtifactError(f"{file.name} is {size} bytes, allowed are {MAX_TENSOR_BYTES}")
        with file.open("rb") as stream:
            _walk(stream)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise error if isinstance(error, ArtifactError) else ArtifactError(f"{file.name}: {error}") from None


def _walk(stream: BinaryIO) -> None:
    if stream.read(4) != b"GGUF":
        raise ValueError("not a GGUF file")
    version, tensors, keys = _take(stream, "<IQQ")
    if version not in (2, 3):
        raise ValueError(f"GGUF versions 2 and 3, little-endian, are read, got {version}")
    if not 1 <= tensors <= MAX_TENSORS:
        raise ValueError(f"a control vector has 1 to {MAX_TENSORS} tensors, got {tensors}")
    if keys > MAX_KEYS:
        raise ValueError(f"allowed are {MAX_KEYS} keys, got {keys}")
    left = MAX_ITEMS
    for _ in range(keys):
        _skip_string(stream)
        (kind,) = _take(stream, "<I")
        if kind != _ARRAY:
            _skip(stream, kind, 1)
            continue
        kind, items = _take(stream, "<IQ")
        left -= items
        if left < 0:
            raise ValueError(f"allowed are {MAX_ITEMS} array items, got {MAX_ITEMS - left} or more")
        _skip(stream, kind, items)


def _skip(stream: BinaryIO, kind: int, times: int) -> None:
    if kind == _STRING:
        for _ in range(times):
            _skip_string(stream)
    elif kind in _SCALARS:
        _read(stream, _SCALARS[kind] * times)
    else:
        raise ValueError(f"no such value type: {kind}")


def _skip_string(stream: BinaryIO) -> None:
    (length,) = _take(stream, "<Q")
    if length > MAX_STRING:
        raise ValueError(f"allowed are strings of {MAX_STRING} bytes, got {length}")
    _read(stream, length)


def _take(stream: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, _read(stream, struct.calcsize(form)))


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError(f"the file ends within its header, at byte {stream.tell()}")
    return data
