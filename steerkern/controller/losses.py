"""The published losses: they supervise the strength ``s`` only.

``s`` and ``w`` are what :meth:`~steerkern.controller.Controller.scores` gives: ``[B]`` and ``[B, L]``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class Scores(NamedTuple):
    """Strength ``s [B]`` and layer weights ``w [B, L]``."""

    s: Tensor
    w: Tensor


def mse(harmful: Scores, harmless: Scores) -> Tensor:
    """``1/2 mean (s - 1)^2 (harmful) + 1/2 mean s^2 (harmless)``: arXiv 2505.20309 with balanced batches.

    The weights ``w`` do not occur: their rows of the output layer get exactly zero gradient, and stay as drawn.
    """
    return 0.5 * (harmful.s - 1.0).square().mean() + 0.5 * harmless.s.square().mean()


def bce(harmful: Scores, harmless: Scores) -> Tensor:
    """Binary cross-entropy of ``s`` as a logit, plus ``0.1 (mean |w - 1/2| + 0.01 mean w)`` on the harmful prompts.

    As in the released code (e7997f9), which takes ``s`` for a logit here and for a strength at inference.
    """
    up = functional.softplus(-harmful.s).mean()
    down = functional.softplus(harmless.s).mean()
    return 0.5 * (up + down) + 0.1 * ((harmful.w - 0.5).abs().mean() + 0.01 * harmful.w.mean())
