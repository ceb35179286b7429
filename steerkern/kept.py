"""Results of long work, kept as they come, so that a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ArtifactError

FILE = "kept.jsonl"


class Kept:
    """Values by key in ``kept.jsonl``, one line each, written when they are known.

    Keys depend on the model's weights, so a folder can be used again for another model.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        """Open the file of ``folder``, or begin one.

        Raises:
            ArtifactError: the file is none of ours.
        """
        self.path = Path(folder) / FILE
        self._about = weights_digest(model)
        self._values: dict[str, Any] = {}
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # a line without its end was cut off while it was written
            try:
                record = json.loads(line)
                self._values[record["key"]] = record["value"]
            except (ValueError, TypeError, KeyError):
                raise ArtifactError(f"{FILE} line {number}: no kept value; remove the file to begin anew") from None
        if lines[-1]:
            self.path.write_bytes(b"\n".join([*lines[:-1], b""]))

    def key(self, about: object) -> str:
        """The key of a result that depends on the model and on ``about`` (JSON values)."""
        return hashlib.sha256(json.dumps([self._about, about]).encode()).hexdigest()[:32]

    def get(self, key: str) -> Any:
        """The value of ``key``, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value (JSON)."""
        self._values[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")


def weights_digest(model: Any) -> str:
    """SHA-256 over names, shapes, dtypes and 64 values of every parameter, evenly spread: quick for any size.

    >>> from torch import nn
    >>> weights_digest(nn.Linear(2, 2)) == weights_digest(nn.Linear(2, 2))
    False
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel())).long().to(flat.device)
        digest.update(flat[at].float().cpu().numpy().tobytes())
    return digest.hexdigest()
