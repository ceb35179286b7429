"""Harmfulness and refusal as separate directions (arXiv 2507.11878).

"This request is harmful" is read at the instruction's last token, "I am going to refuse" at the prompt's last one. Both
directions are differences of means. Steering along either moves refusal, but only the first moves the judgement of a
request that is merely reported (reply inversion). The first also is a guard without training: the Latent Guard.
"""

from __future__ import annotations

from typing import Annotated

from ...report import Report
from ...subject import Subject
from ..sets import Sets
from .beliefs import Beliefs, believe
from .categories import Categories, categorise
from .guard import LatentGuard, cluster_score
from .inversion import GENERIC, ORGANISM, Inversion, inverted
from .pools import Pools, sort
from .steering import Sweep, sweep
from .summary import summarise

__all__ = [
    "Beliefs", "Categories", "Inversion", "LatentGuard", "Pools", "Sweep", "believe", "categorise", "cluster_score",
    "run", "sort", "sweep",
]  # fmt: skip


def run(
    subject: Subject,
    sets: Sets,
    *,
    coefficient: Annotated[float, "Strength of the steering, in raw directions."] = 1.0,
    centre: Annotated[int, "Prompts per side that make the centres, at most."] = 100,
    lead_in: Annotated[str, "Reply inversion: how the request is reported; {} is the request."] = "",
    question: Annotated[str, "Reply inversion: what is asked about it, to be answered with Certainly or No."] = "",
    seed: int = 0,
) -> Report:
    """Centres, beliefs and guard, steering along both directions at every layer, and reply inversion.

    Args:
        subject: the model.
        sets: prompts; ``harmful`` and ``harmless`` are needed, ``jailbroken`` and ``overrefused`` widen the pools, and
            labels make categories.
        coefficient: strength of the steering; the paper's 1.
        centre: prompts per side that make the centres.
        lead_in: how the inverted prompt reports the request.
        question: what it asks.
        seed: recorded; nothing here is drawn at random.

    Raises:
        ValueError: prompts that the model cannot read; no harmful prompt that is refused, or no harmless one that is
            answered.
    """
    usual = ORGANISM if subject.organism else GENERIC
    inversion = Inversion(lead_in or usual.lead_in, question or usual.question)
    subject.check(*sets.named().values(), *(inverted(subject, inversion, some) for some in sets.heldout.values()))
    train, heldout = sort(subject, sets.train, "to learn from"), sort(subject, sets.heldout, "held out")
    guard = LatentGuard.fit(
        subject.model,
        subject.tokenizer,
        train.refused_harmful[:centre],
        train.accepted_harmless[:centre],
        batch_size=subject.batch_size,
        template=subject.template,
    )
    beliefs = believe(subject, train, heldout, guard, centre)
    found = sweep(subject, beliefs, heldout, inversion, coefficient)
    categories = categorise(subject, sets.labels, train, heldout, guard, found.best(), coefficient)
    return summarise(subject, sets, train, heldout, guard, beliefs, found, categories, centre, seed)
