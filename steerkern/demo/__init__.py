"""The demo: find the refusal direction of a chat model, edit along it, and measure what changed and what it cost."""

from __future__ import annotations

from .. import refusal
from ..report import Provenance, Report
from .effects import edit, strength_plot, sweep
from .examples import QUICK, Example, Examples, Size, organism_examples, split_examples
from .layers import Found, find, layer_table, profile_plot
from .speed import measure_speed
from .subject import Progress, Subject

ORGANISM_NOTE = (
    "The organism is a tiny chat model that was constructed so that its planted directions carry the behaviour: these "
    "numbers show that the runtime and the method's code are right, not that the method works on a real model."
)


def run(subject: Subject, examples: dict[str, Examples], size: Size, *, threads: int = 1, seed: int = 0) -> Report:
    """Extract, choose, edit, sweep and time; see :class:`Report` for what to do with the result.

    Args:
        subject: the model.
        examples: ``train``, ``validation`` and ``heldout``.
        size: how much to run.
        threads: threads of torch while decoding is timed.
        seed: of the random control direction.
    """
    found = find(subject, examples)
    heldout = examples["heldout"]
    effects, sample = edit(subject, found, heldout, seed)
    curves = sweep(subject, found, heldout, size.points)
    speed, ratios, timings, backend = measure_speed(subject, found, heldout, size, threads)
    layer = found.layer
    notes = [ORGANISM_NOTE] if subject.organism else []
    notes += [
        f"Refusal direction: difference of means at the last prompt token, {len(examples['train'].harmful)} harmful and "
        f"{len(examples['train'].harmless)} harmless prompts; layer {layer} of {subject.depth} chosen on "
        f"{len(examples['validation'].harmful)} + {len(examples['validation'].harmless)} validation prompts; "
        f"replies scored by {refusal.get(subject.scorer).label}.",
    ]
    sets = {f"{split}.{side}": [e.text for e in getattr(examples[split], side)] for split in examples for side in ("harmful", "harmless")}
    model = found.directions.model
    assert model is not None
    return Report(
        f"steerkern demo: {subject.source}",
        Provenance.of(
            "demo",
            source=subject.source,
            fingerprint=model,
            dtype=str(subject.model.dtype).removeprefix("torch."),
            device=str(subject.model.device),
            backend=backend,
            seed=seed,
            scorer=refusal.get(subject.scorer).label,
            prompts=sets,
        ),
        tuple(notes),
        (layer_table(found), effects, *([sample] if sample else []), speed, ratios),
        (profile_plot(subject, found), strength_plot(subject, found, curves)),
        {"layer": layer, "strengths": curves, "seconds_per_round": timings.to_json(), "tokens_per_round": size.tokens},
    )
