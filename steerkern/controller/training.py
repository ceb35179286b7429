"""Training a controller: balanced batches, a validation share, early stopping; the same seed gives the same bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .losses import Scores, bce, mse
from .network import Controller
from .presets import Preset

Objective = Callable[[Tensor, Tensor], Tensor]
"""The loss of a batch, given the numbers of its harmful and of its harmless prompts, int64 ``[b]``."""
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""``with progress(label, total) as step: step(count)``."""

MARGIN = 0.02
"""By which share the validation loss must fall to count as lower."""


def silent(label: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """No progress bar."""
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Epoch:
    """Mean loss over an epoch's training batches, while the weights move, and on the validation share after it."""

    training: float
    validation: float


@dataclass(frozen=True)
class History:
    """What happened in training: epochs, the number of the one whose weights were kept (from 0), and steps taken."""

    epochs: tuple[Epoch, ...]
    best: int
    steps: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def train(
    controller: Controller,
    objective: Objective,
    counts: tuple[int, int],
    preset: Preset,
    *,
    validation: float = 0.15,
    patience: int = 3,
    seed: int = 0,
    progress: Progress = silent,
) -> History:
    """Minimise ``objective`` over the controller's weights, and leave those of the best epoch in it.

    A batch holds ``batch_size // 2`` prompts of each side; the shorter side is repeated. ``validation`` of each side
    (at least one prompt) is not trained on: its loss is taken after each epoch, and training stops after ``patience``
    epochs that did not lower it. The objective decides what is differentiated; the model stays frozen.

    Args:
        controller: trained in place.
        objective: see :data:`Objective`.
        counts: numbers of harmful and of harmless prompts.
        preset: rates and sizes.
        validation: share, above 0 and below 1.
        patience: epochs.
        seed: of the split and of the batches.
        progress: called with a label and the number of steps.

    Raises:
        ValueError: fewer than two prompts on a side, or a loss that is not finite.
    """
    check_counts(counts)
    if not (math.isfinite(preset.lr) and preset.lr > 0 and preset.clip > 0):
        raise ValueError(f"training needs a rate and a clip above 0, got {preset.lr} and {preset.clip}")
    if not 0.0 < validation < 1.0 or patience < 1 or preset.epochs < 1 or preset.batch_size < 2:
        raise ValueError(
            "training needs a validation share between 0 and 1, a patience and epochs from 1 and batches from 2, "
            f"got {validation}, {patience}, {preset.epochs} and {preset.batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    splits = [_split(count, validation, generator) for count in counts]
    held, kept = [split[0] for split in splits], [split[1] for split in splits]
    half = preset.batch_size // 2
    steps = math.ceil(max(map(len, kept)) / half)
    parameters = list(controller.parameters())
    optimiser = torch.optim.AdamW(parameters, preset.lr, weight_decay=preset.weight_decay, foreach=False)
    epochs: list[Epoch] = []
    best, weights = 0, copy.deepcopy(controller.state_dict())
    with progress("training the controller", preset.epochs * steps) as advance:
        for number in range(preset.epochs):
            losses = []
            orders = [_repeated(side, steps * half, generator) for side in kept]
            for step in range(steps):
                batch = [order[step * half : (step + 1) * half] for order in orders]
                loss = objective(*batch)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, preset.clip)
                losses.append(_finite(loss, f"epoch {number}, step {step}"))
                optimiser.step()
                advance(1)
            with torch.no_grad():
                checked = [_finite(objective(*batch), f"epoch {number}, validation") for batch in _pairs(held, half)]
            epochs.append(Epoch(sum(losses) / len(losses), sum(checked) / len(checked)))
            if number == 0 or epochs[-1].validation < (1 - MARGIN) * epochs[best].validation:
                best, weights = number, copy.deepcopy(controller.state_dict())
            elif number - best >= patience:
                break
    controller.load_state_dict(weights)
    return History(tuple(epochs), best, len(epochs) * steps)


def check_counts(counts: tuple[int, int]) -> None:
    """Raise ValueError unless there are prompts on both sides, to train on and to validate with."""
    for name, count in zip(("harmful", "harmless"), counts, strict=True):
        if count < 2:
            raise ValueError(f"a controller is trained on at least 2 {name} prompts, got {count}")


def score_objective(controller: Controller, states: tuple[Tensor, Tensor], preset: Preset) -> Objective:
    """The published loss of a preset on cached states ``[N, R, H]``, of harmful and of harmless prompts.

    Raises:
        ValueError: the preset's loss is not one of the published ones.
    """
    if preset.loss not in ("mse", "bce"):
        raise ValueError(f"loss {preset.loss!r} is not one on the scores: they are 'mse' and 'bce'")
    loss = mse if preset.loss == "mse" else bce
    device = controller.output.weight.device

    def objective(up: Tensor, down: Tensor) -> Tensor:
        sides = zip(states, (up, down), strict=True)
        return loss(*(Scores(*controller.scores(side[batch].to(device))) for side, batch in sides))

    return objective


def _split(count: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Validation and training numbers, at least one of each."""
    order = torch.randperm(count, generator=generator)
    held = min(max(round(share * count), 1), count - 1)
    return order[:held], order[held:]


def _repeated(numbers: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """``total`` of the numbers: one random order after another."""
    rounds = math.ceil(total / len(numbers))
    return torch.cat([numbers[torch.randperm(len(numbers), generator=generator)] for _ in range(rounds)])[:total]


def _pairs(sides: list[Tensor], half: int) -> Iterator[list[Tensor]]:
    steps = max(1, math.ceil(max(map(len, sides)) / half))
    for step in range(steps):
        yield [side[torch.arange(step * half, (step + 1) * half) % len(side)] for side in sides]


def _finite(loss: Tensor, where: str) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"{where}: the loss is {value}; lower the rate or alpha")
    return value
