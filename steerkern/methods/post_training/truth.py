"""The truth direction: mean(true) - mean(false) at the statement's last token, its probe, and what adding it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...edits import add
from ...extraction import Rendered, instruction_offset, states
from ...extraction.capture import pad
from ...plan import Plan
from ...runtime.logits import next_logits
from ...runtime.session import steer
from ...subject import Subject
from .pairs import Asked


@dataclass(frozen=True, eq=False)
class Told:
    """States ``[N, L, H]`` float32 (``resid_post[l]`` at the period) of statements, centred per topic, and truths."""

    states: Tensor
    truths: Tensor

    def direction(self, layer: int) -> Tensor:
        """``d_truth [H]``, raw: the intervention vector ``u`` is the same for this probe."""
        h = self.states[:, layer]
        return h[self.truths].mean(0) - h[~self.truths].mean(0)


@dataclass(frozen=True, eq=False)
class Probe:
    """Logistic regression on one number, ``x = <h, d_truth>``: true where ``slope * x + bias > 0``."""

    direction: Tensor
    slope: float
    bias: float

    def accuracy(self, told: Told, layer: int) -> float:
        """Share of statements that are told right."""
        x = told.states[:, layer] @ self.direction
        return float(((self.slope * x + self.bias > 0) == told.truths).float().mean())


@dataclass(frozen=True, eq=False)
class Truth:
    """What two models have in common about truth.

    Attributes:
        accuracy: per (probe of, states of) and layer, on held-out statements.
        learnt: own accuracy per model and layer on the statements of the probe.
        directions: raw ``[L, H]`` per model.
        cosines: ``[L]``, between the two.
        layer: probe layer; the vectors are written at ``layers``.
        effects: NIE per (vector of, model steered).
        stock: mean P(true) - P(false) of both models on true and on false statements.
    """

    accuracy: dict[tuple[int, int], list[float]]
    learnt: list[list[float]]
    directions: tuple[Tensor, Tensor]
    cosines: Tensor
    layer: int
    layers: tuple[int, ...]
    effects: dict[tuple[int, int], Effect]
    stock: list[tuple[float, float]]


@dataclass(frozen=True)
class Effect:
    """Normalised indirect effects: false statements towards true, and true ones towards false."""

    to_true: float
    to_false: float

    @property
    def mean(self) -> float:
        """Of both."""
        return (self.to_true + self.to_false) / 2


def read(subject: Subject, asked: Asked) -> Told:
    """States of both sides of every pair at the last token of the statement."""
    prompts = [*asked.true, *asked.false]
    found = states(subject.model, prompts, ("t_inst",), batch_size=subject.batch_size)[:, 1:, 0].float()
    topics = [pair.topic for pair in asked.pairs] * 2
    for topic in set(topics):
        here = torch.tensor([other == topic for other in topics])
        found[here] -= found[here].mean(0)
    return Told(found, torch.arange(len(prompts)) < len(asked.true))


def fit(told: Told, layer: int) -> Probe:
    """The probe of one layer; slope and bias are not regularised."""
    from sklearn.linear_model import LogisticRegression

    direction = told.direction(layer)
    x = told.states[:, layer] @ direction
    scale = float(x.std()) or 1.0
    made: Any = LogisticRegression(C=math.inf, max_iter=1000).fit((x / scale)[:, None].numpy(), told.truths.numpy())
    return Probe(direction, float(made.coef_[0, 0]) / scale, float(made.intercept_[0]))


def compare(subjects: tuple[Subject, Subject], train: Asked, heldout: Asked, layer: int | None) -> Truth:
    """Probes and directions of both models at every layer, and the intervention at ``layer`` (None: the best one).

    The best layer is where both probes tell the statements that they were made of best, the first of equals.
    """
    fitted, tested = [read(s, train) for s in subjects], [read(s, heldout) for s in subjects]
    depth = subjects[0].depth
    probes = [[fit(told, at) for at in range(depth)] for told in fitted]
    learnt = [[probes[i][at].accuracy(told, at) for at in range(depth)] for i, told in enumerate(fitted)]
    both = ((a, b) for a in (0, 1) for b in (0, 1))
    accuracy = {(a, b): [probe.accuracy(tested[b], at) for at, probe in enumerate(probes[a])] for a, b in both}
    first, second = (torch.stack([told.direction(at) for at in range(depth)]) for told in fitted)
    if layer is None:
        layer = max(range(depth), key=lambda at: (learnt[0][at] + learnt[1][at], -at))
    layers = tuple(range(math.ceil(2 * layer / 3), layer + 1))
    stock, effects = [], {}
    for b, subject in enumerate(subjects):
        stock.append((_difference(subject, heldout, heldout.true), _difference(subject, heldout, heldout.false)))
        for a, vectors in enumerate((first, second)):
            effects[a, b] = intervene(subject, heldout, vectors[layer], layers, stock[b])
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=-1)
    return Truth(accuracy, learnt, (first, second), cosines, layer, layers, effects, stock)


def intervene(
    subject: Subject, asked: Asked, vector: Tensor, layers: Sequence[int], stock: tuple[float, float]
) -> Effect:
    """Add ``vector`` on false statements, subtract it on true ones: two tokens at several layers in one pass.

    The tokens are the statement's last one and the one before. With ``PD = mean(P(true) - P(false))`` the effect is
    ``(PD* - PD) / (1 - PD)`` towards true and ``(PD* - PD) / (-1 - PD)`` towards false; ``stock`` holds both PD.
    """
    raised = _difference(subject, asked, asked.false, _write(asked.false, vector, layers, 1.0))
    lowered = _difference(subject, asked, asked.true, _write(asked.true, vector, layers, -1.0))
    true, false = stock
    return Effect((raised - false) / (1 - false), (lowered - true) / (-1 - true))


def _write(prompts: Sequence[Rendered], vector: Tensor, layers: Sequence[int], sign: float) -> Plan:
    last = instruction_offset(prompts)
    return Plan(add(vector, sign), layers=layers, site="resid_post", scope=(last, last - 1), name="truth")


def _difference(subject: Subject, asked: Asked, prompts: Sequence[Rendered], plan: Plan | None = None) -> float:
    found = []
    with steer(subject.model, plan) if plan is not None else nullcontext():
        for start in range(0, len(prompts), subject.batch_size):
            batch = [prompt.ids for prompt in prompts[start : start + subject.batch_size]]
            odds = next_logits(subject.model, *pad(batch, subject.model.device)).softmax(-1)
            found.append(odds[:, asked.labels[0]] - odds[:, asked.labels[1]])
    return float(torch.cat(found).mean())
