"""The reference methods: directional ablation with its selection, CAA, ActAdd, RepE, ITI, Angular Steering, CAST.

Each is a constructor of plans (:mod:`.constructions`, :mod:`.gating`), so that methods are compared by changing one
word; :func:`run` compares them all on one model.
"""

from __future__ import annotations

from typing import Annotated

from ...report import Report
from ...subject import Subject
from ..sets import Sets
from .calibration import Calibration, calibrate
from .constructions import ablation, actadd, addition, affine, angular, caa, iti, repe
from .gating import Gate, conditional, search
from .selection import Candidate, Selection, refusal_tokens, select
from .trials import compare
from .weights import orthogonalise

__all__ = [
    "Calibration",
    "Candidate",
    "Gate",
    "Selection",
    "ablation",
    "actadd",
    "addition",
    "affine",
    "angular",
    "caa",
    "calibrate",
    "conditional",
    "iti",
    "orthogonalise",
    "refusal_tokens",
    "repe",
    "run",
    "search",
    "select",
]


def run(
    subject: Subject,
    sets: Sets,
    *,
    budget: Annotated[float, "KL in nats that calibrated strengths may cost on harmless prompts."] = 0.1,
    heads: Annotated[int, "Heads that ITI moves; 0 is one in twenty."] = 0,
    strength: Annotated[float, "ITI's strength, in standard deviations."] = 15.0,
    seed: int = 0,
) -> Report:
    """Select a direction as the paper does, and ask held-out prompts under every method, towards refusal and away.

    Args:
        subject: the model.
        sets: prompts; ``harmful`` and ``harmless`` are needed, ``jailbroken`` and ``overrefused`` are CAST's.
        budget: KL that calibrated strengths may cost on harmless prompts.
        heads: heads that ITI moves; 0 is one in twenty.
        strength: ITI's.
        seed: recorded; nothing here is drawn at random.

    Raises:
        ValueError: replies that begin alike, or no prompt of a side that behaves as its side should.
    """
    subject.check(*sets.named().values())
    return compare(subject, sets, budget, heads, strength, seed)
