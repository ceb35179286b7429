"""Directions per category of harm (arXiv 2507.11878, section on risk categories).

The paper's finding: harm directions differ from category to category, refusal directions do not; and steering a prompt
along the direction of its own category does more than along the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...extraction import Prompt, states
from ...subject import Question, Subject, request
from .guard import LatentGuard
from .inversion import instruction
from .pools import Pools
from .steering import prefill

FEWEST = 4
"""Prompts to learn from, and held out, that make a category."""


@dataclass(frozen=True, eq=False)
class Categories:
    """What holds for each category, at one layer.

    Attributes:
        layer: of ``resid_pre``, at which prompts are steered.
        counts: prompts to learn from and held out, per category.
        harm: mean cosine, over all layers but the first, of harm directions to those of the other categories.
        refusal: the same of refusal directions.
        own: share of a category's held-out harmful prompts that is refused with its own direction subtracted.
        others: with the mean direction of the other categories subtracted.
        every: with the direction of all harmful prompts subtracted.
    """

    layer: int
    counts: Mapping[str, tuple[int, int]]
    harm: Mapping[str, float]
    refusal: Mapping[str, float]
    own: Mapping[str, float]
    others: Mapping[str, float]
    every: Mapping[str, float]


def categorise(
    subject: Subject,
    labels: Mapping[str, str],
    train: Pools,
    heldout: Pools,
    guard: LatentGuard,
    layer: int,
    coefficient: float,
) -> Categories | None:
    """Directions of refused harmful prompts by label against all harmless ones; None with fewer than two categories.

    ``labels`` says the category of a request (:func:`~steerkern.subject.request`); prompts without one are left out.
    """
    learn, look = _by(labels, train.refused_harmful), _by(labels, heldout.refused_harmful)
    names = [name for name in learn if len(learn[name]) >= FEWEST and len(look.get(name, ())) >= FEWEST]
    if len(names) < 2:
        return None
    less = _means(subject, train.accepted_harmless)
    harm, refusal = (
        {name: _means(subject, learn[name])[at] - less[at] for name in names} for at in ("t_inst", "t_post")
    )
    every = guard.harmful - guard.harmless
    tried: list[Question] = []
    for name in names:
        rendered = subject.render(look[name])
        span = instruction(rendered)
        rest = torch.stack([harm[other][layer] for other in names if other != name]).mean(0)
        for vector in (harm[name][layer], rest, every[layer]):
            tried.append((prefill(vector, layer, span, -coefficient), rendered))
    rates = subject.refusals("categories", tried)
    own, others, all_ = (dict(zip(names, rates[i::3], strict=True)) for i in range(3))
    return Categories(
        layer,
        {name: (len(learn[name]), len(look[name])) for name in names},
        {name: _likeness(harm, name) for name in names},
        {name: _likeness(refusal, name) for name in names},
        own,
        others,
        all_,
    )


def _by(labels: Mapping[str, str], prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        label = labels.get(request(prompt))
        if label is not None:
            found.setdefault(label, []).append(prompt)
    return found


def _means(subject: Subject, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Mean states ``[L+1, H]`` at both tokens."""
    read = states(
        subject.model, subject.render(prompts), ("t_inst", "t_post"), batch_size=subject.batch_size, progress=False
    )
    return {"t_inst": read[:, :, 0].double().mean(0).float(), "t_post": read[:, :, 1].double().mean(0).float()}


def _likeness(directions: Mapping[str, Tensor], name: str) -> float:
    cosines = [
        functional.cosine_similarity(directions[name][1:], other[1:], dim=-1, eps=1e-12)
        for key, other in directions.items()
        if key != name
    ]
    return float(torch.stack(cosines).mean())
