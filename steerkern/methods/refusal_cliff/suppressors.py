"""Which heads take the refusal away at the marker, and what happens without them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import refusal
from ...runtime import heads
from ...runtime.heads import Head, HeadSite
from ...subject import Subject
from .cliffs import Preset, cliff
from .prober import Probe, scores
from .traces import Thinking, Trace, answers, ask, write


def attribution(
    subject: Subject, traces: Sequence[Trace], probe: Probe, sites: dict[int, HeadSite]
) -> dict[Head, float]:
    """``c[l, h] = <a[l, h], w> / |w|`` at the last token, averaged over traces; the most negative heads suppress.

    ``a[l, h] = W_O z~`` lies in the residual stream and ``w`` behind the final norm: a ranking, not a score.
    """
    rows = [trace.ids for trace in traces]
    last = [len(trace.ids) - 1 for trace in traces]
    z = heads.read(subject.model, rows, last, batch_size=subject.batch_size, sites=sites)
    unit = probe.weight / probe.weight.norm()
    found: dict[Head, float] = {}
    for layer, site in sites.items():
        total = torch.zeros(site.heads)
        for some in z[layer].split(subject.batch_size):
            added = heads.contributions(site, some).float()
            total += (added @ unit.to(added.device)).sum(0).cpu()
        found.update({(layer, head): float(total[head]) / len(traces) for head in range(site.heads)})
    return found


def ranked(found: dict[Head, float]) -> list[Head]:
    """All heads, the strongest suppressor first."""
    return sorted(found, key=lambda head: found[head])


@dataclass(frozen=True)
class Ablation:
    """What a set of heads at zero does to held-out items.

    Attributes:
        heads: those at zero.
        final: mean final score of the items as they were written, read again.
        refused: share of the prompts that are refused when thought and answer are written anew; None if not asked.
    """

    heads: tuple[Head, ...]
    final: float
    refused: float | None


@dataclass(frozen=True)
class Ablations:
    """Without any, with the strongest suppressors, and with random sets of as many other heads."""

    stock: Ablation
    top: Ablation
    random: tuple[Ablation, ...]

    def raised(self, found: Ablation) -> float:
        """By how much the final score is higher than without an ablation."""
        return found.final - self.stock.final


def ablate(
    subject: Subject,
    traces: Sequence[Trace],
    probe: Probe,
    preset: Preset,
    how: Thinking,
    top: Sequence[Head],
    sites: dict[int, HeadSite],
    controls: int,
    seed: int,
) -> Ablations:
    """Final scores and refusals of ``traces`` without heads, in prefill and decoding, thought and answer."""
    chance = random.Random(seed)
    others = [(layer, head) for layer, site in sites.items() for head in range(site.heads) if (layer, head) not in top]
    drawn = [tuple(chance.sample(others, min(len(top), len(others)))) for _ in range(controls)]

    def without(some: Sequence[Head], label: str, written: bool = True) -> Ablation:
        with heads.scaled(subject.model, dict.fromkeys(some, 0.0), repair=preset.repair, sites=sites):
            read = scores(subject, traces, probe)
            final = sum(cliff(t, s, preset).final for t, s in zip(traces, read, strict=True)) / len(traces)
            refused = _refused(subject, traces, how, label, [preset.repair, sorted(some)]) if written else None
        return Ablation(tuple(some), final, refused)

    stock = Ablation((), without((), "", written=False).final, sum(t.refused for t in traces) / len(traces))
    random_sets = tuple(without(some, "without random heads", i == 0) for i, some in enumerate(drawn))
    return Ablations(stock, without(top, "without the suppressors"), random_sets)


def _refused(subject: Subject, traces: Sequence[Trace], how: Thinking, label: str, under: object) -> float:
    rendered = ask(subject, [trace.prompt for trace in traces], how)
    texts = answers(subject, write(subject, label, rendered, how, under), how)
    return refusal.rate(subject.scorer, texts)
