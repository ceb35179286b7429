"""Presets: the guided controller as the paper states it, as its code runs it, and trained by the outcome.

arXiv 2505.20309 (v3) and the released code (commit e7997f9) differ materially, so both have a name here. The losses of
both leave the allocation over layers to chance: under ``mse`` the layer weights get exactly zero gradient, and the
regulariser that ``bce`` adds pulls every weight to 1/2 and knows nothing of layers. ``outcome`` is steerkern's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

from .network import Weights

Reads = Literal["last third", "last four", "halfway"]
Kind = Literal["mse", "bce", "outcome"]
Vectors = Literal["unembed", "embed", "means"]


@dataclass(frozen=True)
class Preset:
    """What a controller reads, what it weighs, and how it is trained.

    Attributes:
        name: of the preset.
        reads: of ``L`` layers, ``resid_post`` of those from ``2L/3`` on, of the last four, or of the one halfway.
        vectors: the direction that it scales: of output embeddings (``W_U``), of input embeddings (``W_E``), or one
            difference of means per layer.
        alpha: global strength of the plan: times a unit vector, or times the raw difference of means.
        loss: on the strength alone (see :func:`~steerkern.controller.losses.mse` and ``bce``), or on the replies.
        lr: of AdamW.
        weight_decay: of AdamW. None was stated for the paper; with 0 weights without a gradient stay as they were.
        clip: largest norm of the gradient.
        epochs: at most; training also stops when the loss on the validation share no longer falls.
        batch_size: prompts per step, half of each side.
        hidden: hidden units.
        layer_norm: normalise the states.
        weights: how layer weights are made of outputs.
        every_token: ask the controller in every forward, not once per prompt.
        header: train on prompts with the generation header, as they are asked later.
        scope: of the plan; ``reply`` steers the first generated token as well.
    """

    name: str
    reads: Reads
    vectors: Vectors
    alpha: float
    loss: Kind
    lr: float
    weight_decay: float
    clip: float
    epochs: int
    batch_size: int
    hidden: int
    layer_norm: bool
    weights: Weights
    every_token: bool
    header: bool
    scope: str

    def read_layers(self, depth: int) -> tuple[int, ...]:
        """The layers whose ``resid_post`` it reads in a model of ``depth`` layers.

        >>> PAPER.read_layers(32), CODE.read_layers(32), OUTCOME.read_layers(32)
        ((22, 23, 24, 25, 26, 27, 28, 29, 30, 31), (28, 29, 30, 31), (15,))
        """
        if self.reads == "halfway":
            return (max(depth // 2 - 1, 0),)
        first = -(-2 * depth // 3) if self.reads == "last third" else max(depth - 4, 0)
        return tuple(range(min(first, depth - 1), depth))


PAPER = Preset(
    "paper",
    reads="last third",
    vectors="unembed",
    alpha=2.0,
    loss="mse",
    lr=5e-5,
    weight_decay=0.0,
    clip=1.0,
    epochs=4,
    batch_size=4,
    hidden=1024,
    layer_norm=False,
    weights="sigmoid",
    every_token=False,
    header=True,
    scope="decode",
)
CODE = Preset(
    "code",
    reads="last four",
    vectors="embed",
    alpha=4.0,
    loss="bce",
    lr=5e-5,
    weight_decay=0.01,
    clip=1.0,
    epochs=10,
    batch_size=8,
    hidden=1024,
    layer_norm=False,
    weights="sigmoid",
    every_token=True,
    header=False,
    scope="reply",
)
OUTCOME = Preset(
    "outcome",
    reads="halfway",
    vectors="means",
    alpha=1.0,
    loss="outcome",
    lr=3e-3,
    weight_decay=0.0,
    clip=1.0,
    epochs=20,
    batch_size=32,
    hidden=32,
    layer_norm=True,
    weights="softmax",
    every_token=False,
    header=True,
    scope="reply",
)
PRESETS = MappingProxyType({preset.name: preset for preset in (PAPER, CODE, OUTCOME)})
"""All presets by name."""


def get(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: listing the names.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def check_vectors(name: str) -> Vectors:
    """The kind of direction of a name; ValueError if there is none."""
    if name not in get_args(Vectors):
        raise ValueError(f"vectors must be {', '.join(get_args(Vectors))}, got {name!r}")
    return cast(Vectors, name)
