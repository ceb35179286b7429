"""llm-steer: patched forwards that add to the input of a block, scaled by the norm of the last token's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .adapter import Adapter, Change, Place, Rows, Steered, directions, generate, layers_of, strength_of

SCALE = 0.5


class Tokenizer:
    """What the package asks of a tokenizer: the text is nobody's here."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of any text."""
        return [1]


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """``Steer.add`` with a method that gives the vector instead of one computed from a text."""
    from llm_steer import Steer

    steering = Steer(model, Tokenizer())
    vectors = {layer: _pushed(rows, layer) for layer in layers_of(rows)}

    def method(element: Any, step: int, layer: int) -> Tensor:
        return vectors[layer]

    try:
        for layer in layers_of(rows):
            steering.add(layer, SCALE, "", steering_method=method)
        yield Steered(model, lambda inputs, tokens: generate(model, inputs, tokens))
    finally:
        steering.reset_all()


def _pushed(rows: Rows, layer: int) -> Tensor:
    return SCALE * strength_of(rows) * directions(rows, layer)


def _relative(vector: Tensor) -> Change:
    return lambda h: h + vector * (h[:, -1:].square().mean(-1, keepdim=True) + 1e-6).sqrt()


def block_inputs(model: Any, rows: Rows) -> list[tuple[Place, Change]]:
    """``h + v * rms(h[last])`` at the input of each block, as the package documents it."""
    return [((model.model.layers[layer], "input"), _relative(_pushed(rows, layer))) for layer in layers_of(rows)]


ADAPTER = Adapter(
    "llm-steer",
    ("add",),
    steer,
    package="llm-steer",
    means=block_inputs,
    note="adds at the input of a block, relative to the norm of the last token of the chunk",
)
