"""The demo: find the refusal direction of a chat model, edit along it, and measure what changed and what it cost."""

from __future__ import annotations

from collections.abc import Mapping

from .. import refusal
from ..report import Provenance, Report
from ..subject import Progress, Subject
from .effects import edit, effect_table, receipt_table, reply_table, strength_plot, sweep
from .examples import QUICK, Example, Examples, Size, organism_examples, prompts, split_examples
from .layers import Found, find, layer_table, profile_plot
from .speed import measure_speed, ratio_table, speed_table

__all__ = ["QUICK", "Example", "Examples", "Progress", "Size", "Subject", "organism_examples", "run", "split_examples"]

ORGANISM_NOTE = (
    "The organism is a tiny chat model that was constructed so that its planted directions carry the behaviour: these "
    "numbers show that the runtime and the method's code are right, not that the method works on a real model."
)


def run(subject: Subject, examples: Mapping[str, Examples], size: Size, *, threads: int = 1, seed: int = 0) -> Report:
    """Extract, choose a layer, edit, sweep the strength and time the decoding.

    Args:
        subject: the model.
        examples: ``train``, ``validation`` and ``heldout`` prompts.
        size: how much to run.
        threads: threads of torch while decoding is timed.
        seed: of the random direction that serves as control.
    """
    heldout = examples["heldout"]
    found = find(subject, examples["train"], examples["validation"])
    effects = edit(subject, found, heldout, seed)
    curves = sweep(subject, found, heldout, size.points)
    speed = measure_speed(subject, found, heldout, size, threads)
    tables = [layer_table(found), effect_table(subject, found, effects), receipt_table(effects)]
    if subject.organism:
        tables.append(reply_table(effects))
    return Report(
        f"steerkern demo: {subject.source}",
        _provenance(subject, examples, speed.backend, seed),
        _notes(subject, examples, found),
        (*tables, speed_table(subject, speed), ratio_table(subject, speed)),
        (profile_plot(subject, found), strength_plot(subject, found, curves)),
        {"layer": found.layer, "strengths": curves, "seconds": speed.timings.to_json(), "tokens_per_run": size.tokens},
    )


def _notes(subject: Subject, examples: Mapping[str, Examples], found: Found) -> tuple[str, ...]:
    train, check = examples["train"], examples["validation"]
    notes = [ORGANISM_NOTE] if subject.organism else []
    notes.append(
        f"Direction: difference of means at the last prompt token over {len(train.harmful)} harmful and "
        f"{len(train.harmless)} harmless prompts. Layer {found.layer} of {subject.depth} chosen on "
        f"{len(check.harmful)} + {len(check.harmless)} others. Replies scored by {refusal.get(subject.scorer).label}."
    )
    if found.added[found.layer] - found.ablated[found.layer] < 0.5:
        notes.append("No layer's direction carries refusal here: adding and ablating it differ by less than half.")
    return tuple(notes)


def _provenance(subject: Subject, examples: Mapping[str, Examples], backend: str, seed: int) -> Provenance:
    asked = {}
    for split, sides in examples.items():
        asked[f"{split} harmful"] = prompts(sides.harmful)
        asked[f"{split} harmless"] = prompts(sides.harmless)
    return subject.provenance("demo", asked, backend=backend, seed=seed)
