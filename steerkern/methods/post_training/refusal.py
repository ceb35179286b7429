"""The refusal directions of two models, each in both: are harmless requests refused then, and harmful ones answered?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...directions import Directions
from ...edits import ablate, add
from ...extraction import extract
from ...plan import Plan
from ...subject import Asked, Question, Subject
from ..sets import Sets

DEPTH = 0.8
"""Directions of the last fifth of the layers are not tried: an edit there acts on the next word, not the decision."""
TRIED = 32
"""Prompts per side on which the layers are tried."""


@dataclass(frozen=True)
class Refused:
    """Shares of refused replies of one model under the direction of one model."""

    harmless_steered: float
    harmful_ablated: float


@dataclass(frozen=True, eq=False)
class Transfer:
    """Refusal directions of two models and what each does in each.

    Attributes:
        directions: per model, ``resid_pre``, position ``t_post``.
        cosines: by layer.
        layer: whose directions are used.
        strengths: coefficient at each of the three sites, per steered model.
        stock: shares refused without any edit per model: harmless, harmful.
        shares: per (direction of, model edited).
    """

    directions: tuple[Directions, Directions]
    cosines: dict[int, float]
    layer: int
    strengths: tuple[float, float]
    stock: tuple[tuple[float, float], tuple[float, float]]
    shares: dict[tuple[int, int], Refused]


def steering(unit: Tensor, layer: int, coefficient: float) -> Plan:
    """``coefficient * unit`` added at each of ``resid_pre``, ``resid_mid`` and ``resid_post`` of one layer.

    The shift is three times the coefficient, but for what the branches answer to the first two.
    """
    edit = add(unit, coefficient)
    here = [Plan(edit, layers=layer, site=site, name="steer") for site in ("resid_pre", "resid_mid", "resid_post")]
    return (here[0] + here[1] + here[2]).named("steer")


def ablation(unit: Tensor, depth: int) -> Plan:
    """``unit`` projected out of ``resid_pre``, ``resid_mid`` and ``resid_post`` of every layer.

    ``resid_post`` of a layer is ``resid_pre`` of the next: written once, since two edits of one site act on the row as
    it arrived and would remove the direction twice.
    """
    edit = ablate(unit)
    inner = Plan(edit, site="resid_pre", name="ablate") + Plan(edit, site="resid_mid", name="ablate")
    return (inner + Plan(edit, layers=depth - 1, site="resid_post", name="ablate")).named("ablate")


def transfer(subjects: tuple[Subject, Subject], sets: Sets, layer: int | None, coefficient: float | None) -> Transfer:
    """Directions of both models from the training prompts, and their effects on the held-out ones.

    ``layer`` None takes the one at which the more refusing model's own direction does most on training prompts.
    ``coefficient`` None adds as much as each model's own raw difference of means at each of the three sites.
    """
    train, heldout = sets.train, sets.heldout
    found = tuple(
        extract(s.model, s.tokenizer, train["harmful"], train["harmless"], batch_size=s.batch_size, template=s.template)
        for s in subjects
    )
    common = [at for at in found[0] if at in found[1]]
    cosines = {at: float(found[0][at].unit @ found[1][at].unit) for at in common}
    stock = [_stock(subject, heldout["harmless"], heldout["harmful"]) for subject in subjects]
    if layer is None:
        most = max((0, 1), key=lambda i: stock[i][1])
        layer = _best(subjects[most], found[most], common, train["harmless"][:TRIED], train["harmful"][:TRIED])
    elif layer not in cosines:
        raise ValueError(f"layer {layer}: refusal directions are known at layers {', '.join(map(str, common))}")
    strengths = [coefficient if coefficient is not None else found[b][layer].norm for b in (0, 1)]
    shares = {}
    for b, subject in enumerate(subjects):
        units = [directions[layer].unit for directions in found]
        questions: list[Question] = []
        for unit in units:
            questions.append((steering(unit, layer, strengths[b]), heldout["harmless"]))
            questions.append((ablation(unit, subject.depth), heldout["harmful"]))
        rates = subject.refusals(f"refusal directions in {subject.source}", questions)
        shares.update({(a, b): Refused(*rates[2 * a : 2 * a + 2]) for a in (0, 1)})
    return Transfer((found[0], found[1]), cosines, layer, (strengths[0], strengths[1]), (stock[0], stock[1]), shares)


def _stock(subject: Subject, harmless: Sequence[Asked], harmful: Sequence[Asked]) -> tuple[float, float]:
    rates = subject.refusals(f"replies of {subject.source}", [(None, harmless), (None, harmful)])
    return rates[0], rates[1]


def _best(
    subject: Subject,
    directions: Directions,
    layers: Sequence[int],
    harmless: Sequence[Asked],
    harmful: Sequence[Asked],
) -> int:
    tried = [at for at in layers if at < DEPTH * subject.depth] or list(layers)
    questions: list[Question] = []
    for at in tried:
        questions.append((steering(directions[at].unit, at, directions[at].norm), harmless))
        questions.append((ablation(directions[at].unit, subject.depth), harmful))
    rates = torch.tensor(subject.refusals("trying every layer", questions)).reshape(-1, 2)
    return tried[int((rates[:, 0] - rates[:, 1]).argmax())]
