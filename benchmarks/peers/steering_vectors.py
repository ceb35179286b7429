"""steering-vectors: a context manager over forward hooks, one vector per layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .adapter import Adapter, Rows, Steered, generate, kind_of, layers_of, strength_of


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """``SteeringVector.apply`` with the operator that the package ships for the edit."""
    from steering_vectors import SteeringVector, ablation_operator, ablation_then_addition_operator

    (edit,), kind = rows, kind_of(rows)
    assert edit is not None
    scale = 1.0 if kind == "ablate" else strength_of(rows)
    vector = SteeringVector({layer: scale * edit.vectors[layer][0] for layer in layers_of(rows)})
    operator = {"add": None, "ablate": ablation_operator(), "clamp": ablation_then_addition_operator()}[kind]
    with vector.apply(model, operator=operator):
        yield Steered(model, lambda inputs, tokens: generate(model, inputs, tokens))


ADAPTER = Adapter("steering-vectors", ("add", "ablate", "clamp"), steer, package="steering-vectors")
