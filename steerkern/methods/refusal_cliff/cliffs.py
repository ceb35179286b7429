"""Plateau, cliff and misalignment score of single items, and mean curves over many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...runtime.heads import Repair
from .traces import Trace

SKIPPED = 8
"""Tokens at the end of a thought that are no plateau any more."""
PERCENTILE = 0.9


@dataclass(frozen=True)
class Preset:
    """Which of the definitions count.

    Attributes:
        plateau: over the thought, its maximum, or the 90th percentile without the last :data:`SKIPPED` tokens.
        final: at the last token, or the mean over the marker's tokens.
        order: items are selected by the largest misalignment score, or by the lowest final score.
        repair: the norm that is put back after an ablation.
        zeros: mean curves over whole sequences, zeros where a sequence has not begun.
        published: the released training of the prober.
    """

    plateau: Literal["maximum", "percentile"]
    final: Literal["last", "marker"]
    order: Literal["misalignment", "final"]
    repair: Repair
    zeros: bool = False
    published: bool = False


PRESETS = {
    "robust": Preset("percentile", "marker", "misalignment", "token"),
    "paper": Preset("maximum", "last", "misalignment", "global"),
    "code": Preset("maximum", "last", "final", "global", zeros=True, published=True),
}


def preset_of(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: listing the names.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}") from None


@dataclass(frozen=True)
class Cliff:
    """``I_plateau`` and ``I_final`` of one item, 0 to 1."""

    plateau: float
    final: float

    @property
    def misalignment(self) -> float:
        """``MS = I_plateau - I_final``."""
        return self.plateau - self.final


def cliff(trace: Trace, scores: Tensor, preset: Preset) -> Cliff:
    """Plateau and cliff of an item from its scores ``[S]``."""
    thought = scores[trace.start : trace.close]
    if preset.plateau == "maximum":
        plateau = thought.max()
    else:
        plateau = (thought[:-SKIPPED] if len(thought) > SKIPPED else thought).quantile(PERCENTILE)
    final = scores[-1] if preset.final == "last" else scores[trace.close :].mean()
    return Cliff(float(plateau), float(final))


def mean_curve(scores: Tensor, mask: Tensor, points: int, *, zeros: bool = False) -> Tensor:
    """Mean over right-aligned sequences, resampled: ``[points]`` from ``scores`` and ``mask`` (bool), both ``[N, S]``.

    Columns that no sequence reaches do not count, so padding changes nothing. ``zeros`` is the published mean, which
    counts a sequence as 0 where it has not begun and therefore sinks to the left.
    """
    reached = mask.any(0)
    scores, mask = scores[:, reached], mask[:, reached]
    total = torch.where(mask, scores, torch.zeros(())).sum(0)
    mean = total / (len(scores) if zeros else mask.sum(0))
    return functional.interpolate(mean[None, None], size=points, mode="linear", align_corners=True)[0, 0]


def trajectory(
    traces: Sequence[Trace], scores: Sequence[Tensor], *, points: tuple[int, int] = (30, 60), zeros: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """x and mean score: the prompt on [0, 1], the thought on [1, 2], the marker's tokens up to 2.2.

    With ``zeros``, 100 points of whole sequences on [0, 2.2], as published.
    """
    if zeros:
        curve = mean_curve(*_right_aligned(scores), 100, zeros=True)
        return tuple(torch.linspace(0, 2.2, 100).tolist()), tuple(curve.tolist())
    parts = [
        [s[: t.start] for t, s in zip(traces, scores, strict=True)],
        [s[t.start : t.close] for t, s in zip(traces, scores, strict=True)],
        [s[t.close :] for t, s in zip(traces, scores, strict=True)],
    ]
    counts = (*points, max(map(len, parts[2])))
    x = [torch.linspace(0, 0.99, counts[0]), torch.linspace(1, 2, counts[1])]
    x.append(2 + 0.2 * torch.arange(1, counts[2] + 1) / counts[2])
    y = [mean_curve(*_right_aligned(part), count) for part, count in zip(parts, counts, strict=True)]
    return tuple(torch.cat(x).tolist()), tuple(torch.cat(y).tolist())


def ending(scores: Sequence[Tensor], tokens: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """x and mean score of the last ``tokens`` tokens, the very last one at -1."""
    rows, mask = _right_aligned([row[-tokens:] for row in scores])
    width = rows.shape[1]
    curve = mean_curve(rows, mask, width)
    return tuple(float(x) for x in range(-width, 0)), tuple(curve.tolist())


def _right_aligned(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    scores, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        scores[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return scores, mask
