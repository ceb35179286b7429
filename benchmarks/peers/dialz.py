"""dialz: repeng's wrapper over a model that it loads itself, in half precision."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from .adapter import Adapter, Rows, Steered, generate, layers_of
from .control_module import KINDS, set_control


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """``SteeringModel`` of a saved checkpoint; its weights are then those of ``model`` again, in fp32."""
    from dialz import SteeringModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        wrapped = SteeringModel(folder, layers_of(rows))
    wrapped.model.float().eval()
    with torch.no_grad():
        for name, weight in wrapped.model.named_parameters():
            weight.copy_(model.get_parameter(name.replace(".block.", ".")))
    try:
        set_control(wrapped, rows)
        yield Steered(wrapped.model, lambda inputs, tokens: generate(wrapped, inputs, tokens))
    finally:
        wrapped.unwrap()


ADAPTER = Adapter(
    "dialz", KINDS, steer, package="dialz", per_row=True, note="it loads fp16 only; cast to fp32 for the comparison"
)
