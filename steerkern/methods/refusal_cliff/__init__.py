"""Refusal cliff and Cliff-as-a-Judge (arXiv 2510.06036).

In a reasoning model a linear refusal score can stay high through the thought and fall off at the marker that ends it.
The run fits that score, traces it over prompt, thought and marker, finds the attention heads that write the fall,
switches them off, and picks the items with the deepest cliffs as safety-training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from ...extraction import Prompt
from ...report import Report
from ...runtime import heads
from ...subject import Subject
from ..sets import Sets
from .cliffs import Cliff, Preset, cliff, mean_curve, preset_of, trajectory
from .judge import Selection, select
from .prober import Probe, fit, scores
from .summary import Found, summarise
from .suppressors import ablate, attribution, ranked
from .traces import Thinking, Trace, think

__all__ = [
    "Cliff", "Preset", "Probe", "Selection", "Thinking", "Trace", "ablate", "attribution", "cliff", "fit", "mean_curve",
    "run", "scores", "select", "think", "trajectory",
]  # fmt: skip

FEWEST = 4
"""Answered harmful prompts that make a group of cliffs; with fewer, all harmful prompts are taken."""
GENERIC, ORGANISM = "I'm sorry, but I can't help with that.", "I cannot help with that."


def run(
    subject: Subject,
    sets: Sets,
    *,
    preset: Annotated[str, "robust, paper or code: which definitions count."] = "robust",
    marker: Annotated[str, "The text that closes a thought."] = "</think>",
    max_thought: Annotated[int, "Tokens of a thought, at most."] = 1024,
    temperature: Annotated[float, "Of the thoughts; 0 is greedy."] = 0.7,
    share: Annotated[float, "Share of all attention heads that is switched off."] = 0.03,
    controls: Annotated[int, "Random sets of as many heads."] = 5,
    choose: Annotated[int, "Items to choose for training."] = 32,
    answer: Annotated[str, "The refusal that chosen items are to learn."] = "",
    seed: int = 0,
) -> Report:
    """Prober, trajectories, suppressor heads and their ablation, and the selection of training data.

    Args:
        subject: a model that thinks before it answers.
        sets: ``harmful`` and ``harmless`` are needed; ``jailbroken`` prompts count as harmful.
        preset: a name of :data:`~.cliffs.PRESETS`.
        marker: the text that closes a thought.
        max_thought: tokens of a thought; the published traces take 8192.
        temperature: of the thoughts; the published one.
        share: of all heads; the paper's 3 %.
        controls: random sets of as many heads; 0 for none.
        choose: items for training.
        answer: the refusal that they are to learn.
        seed: of thoughts, validation split and random heads.

    Raises:
        ValueError: an unknown preset, a share outside (0, 1), a marker that never comes, prompts without room for a
            thought, fewer than five prompts that are refused or answered after thinking.
        PlanError: a family whose head site is not found.
    """
    rules, how = preset_of(preset), Thinking(marker, max_thought, temperature, seed)
    if controls < 0 or choose < 1:
        raise ValueError(f"controls must be at least 0 and choose at least 1, got {controls} and {choose}")
    if not 0 < share < 1:
        raise ValueError(f"the share of heads must lie between 0 and 1, got {share}")
    sites = heads.find(subject.model)
    harmful, harmless = _think(subject, sets.train, "to learn from", how)
    probe = fit(
        subject,
        [trace for trace in harmful if trace.refused],
        [trace for trace in harmless if not trace.refused],
        published=rules.published,
        seed=seed,
    )
    attributed = attribution(subject, _falling(harmful), probe, sites)
    top = ranked(attributed)[: max(1, round(share * len(attributed)))]
    held = _think(subject, sets.heldout, "held out", how)
    tracks = [scores(subject, traces, probe) for traces in held]
    ablations = ablate(subject, _falling(held[0]), probe, rules, how, top, sites, controls, seed)
    learnt = scores(subject, harmful, probe)
    cliffs = [cliff(trace, track, rules) for trace, track in zip(harmful, learnt, strict=True)]
    chosen = select(harmful, cliffs, rules, choose, marker, answer or (ORGANISM if subject.organism else GENERIC))
    return summarise(subject, sets, Found(preset, how, probe, attributed, ablations, chosen, held, tracks), seed)


def _think(
    subject: Subject, part: Mapping[str, Sequence[Prompt]], which: str, how: Thinking
) -> tuple[list[Trace], list[Trace]]:
    """The traces of harmful (jailbroken ones included) and of harmless prompts."""
    harmful = [*part["harmful"], *part.get("jailbroken", ())]
    return (
        think(subject, f"thoughts on harmful prompts {which}", harmful, how),
        think(subject, f"thoughts on harmless prompts {which}", part["harmless"], how),
    )


def _falling(harmful: list[Trace]) -> list[Trace]:
    """Harmful prompts that are answered: where a cliff may be."""
    answered = [trace for trace in harmful if not trace.refused]
    return answered if len(answered) >= FEWEST else harmful
