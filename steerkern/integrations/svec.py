"""Steering vectors of IBM's activation-steering (``.svec``): JSON with one vector per layer.

``{"model_type": ..., "directions": {"LAYER": [H numbers]}, "explained_variances": {"LAYER": number}}``. A vector of
layer ``l`` is taken from the outputs of block ``l`` there (``hidden_states[l + 1]``), and written at the *input* of
block ``l``: the site of the directions is where they are written, ``resid_pre[l]``.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

import torch

from ..artifacts import MAX_LAYERS, MAX_WIDTH
from ..directions import Directions
from ..errors import ArtifactError

MAX_BYTES = 256 << 20


def read_svec(path: str | os.PathLike[str]) -> Directions:
    """Read a ``.svec`` file; the model type and the explained variances go into the provenance.

    Raises:
        ArtifactError: no such file, too large, not JSON, or a value that is none of a steering vector's.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{file.name} is larger than {MAX_BYTES} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("directions"), dict) or not content["directions"]:
        raise ArtifactError(f"{file.name} is no steering vector: it has no directions")
    vectors = {_layer(file.name, key): _vector(file.name, key, row) for key, row in content["directions"].items()}
    if len(widths := {len(vector) for vector in vectors.values()}) > 1:
        raise ArtifactError(f"{file.name} has directions of widths {sorted(widths)}")
    variances = content.get("explained_variances")
    provenance = {
        "format": "svec",
        "model_hint": str(content.get("model_type", ""))[:128],
        "explained_variances": {
            str(key)[:8]: float(value)
            for key, value in (variances if isinstance(variances, dict) else {}).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        },
    }
    try:
        return Directions.of(vectors, "resid_pre", "svec", provenance=provenance)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{file.name}: {error}") from None


def _layer(name: str, key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 6 or int(key) >= MAX_LAYERS:
        raise ArtifactError(f"{name}: {reprlib.repr(key)} is no layer number")
    return int(key)


def _vector(name: str, key: str, row: Any) -> torch.Tensor:
    if not isinstance(row, list) or not 0 < len(row) <= MAX_WIDTH:
        raise ArtifactError(f"{name}: layer {key} must be a list of 1 to {MAX_WIDTH} numbers")
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in row):
        raise ArtifactError(f"{name}: layer {key} holds something that is no number")
    return torch.tensor(row, dtype=torch.float32)
