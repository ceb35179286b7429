"""What post-training changes inside a model (arXiv 2504.02904): a base model against its descendant.

Four questions: where facts sit (patching), whether the truth direction survives, whether the refusal direction
survives, and whether the entropy neurons behind a model's confidence stay the same. The first three put states and
directions of each model into the other, so both must have one width and depth and read the statements as the same
tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ...report import Report
from ...runtime.patching import check_exchange, check_tokenizers
from ...subject import Subject
from ..sets import Sets
from .entropy import Neurons, entropy_neurons, overlap
from .knowledge import Knowledge, normalise, pearson, trace
from .pairs import (
    GENERIC,
    ORGANISM,
    Asked,
    Pair,
    Question,
    Statements,
    ask,
    bundled,
    read_pairs,
    same_pattern,
    split,
    texts,
)
from .refusal import Transfer, ablation, steering, transfer
from .summary import summarise
from .truth import Truth, compare, fit, intervene, read

__all__ = [
    "Asked",
    "Knowledge",
    "Neurons",
    "Pair",
    "Question",
    "Statements",
    "Transfer",
    "Truth",
    "ablation",
    "ask",
    "compare",
    "entropy_neurons",
    "fit",
    "intervene",
    "normalise",
    "overlap",
    "pearson",
    "read",
    "run",
    "steering",
    "trace",
    "transfer",
]


def run(
    subject: Subject,
    sets: Sets,
    other: Subject,
    *,
    statements: Annotated[
        Path | None, "Statement pairs (.jsonl, .csv): columns true, false and, where there are several topics, topic."
    ] = None,
    suffix: Annotated[str, "What follows a statement, before its label."] = "",
    true: Annotated[str, "Label of a true statement."] = "",
    false: Annotated[str, "Label of a false statement."] = "",
    pairs: Annotated[int, "Statement pairs that are traced, at most."] = 64,
    probe_layer: Annotated[int | None, "Layer of the truth probe; by default where both probes are best."] = None,
    refusal_layer: Annotated[int | None, "Layer of the refusal direction; by default where it does most."] = None,
    coefficient: Annotated[
        float | None, "Steering at each of three sites; by default the norm of the model's own difference of means."
    ] = None,
    noise: Annotated[float, "Noise variant: standard deviation, in norms of the embedding."] = 0.05,
    seed: int = 0,
) -> Report:
    """Trace knowledge, compare truth and refusal directions and entropy neurons of two models.

    Args:
        subject: the base model.
        sets: prompts; ``harmful`` and ``harmless`` are needed.
        other: its descendant.
        statements: a file of statement pairs; the organism has its own.
        suffix, true, false: how a statement's label is asked for; the three belong together.
        pairs: pairs that are traced.
        probe_layer: of the truth direction; it is written at layers from two thirds of it up to it.
        refusal_layer: of the refusal direction.
        coefficient: refusal steering in residual units; it acts at three sites, so the shift is three times that.
        noise: of the noise variant of the tracing.
        seed: of the split of the statements, the demonstrations and the noise.

    Raises:
        ValueError: models of different width, depth or tokens, an empty set, too few pairs or pairs of unequal length,
            or a layer that the models do not have; all of these before the long work.
    """
    check_exchange(subject.model, other.model)
    for part, prompts in (("to learn from", sets.train), ("held out", sets.heldout)):
        for name in ("harmful", "harmless"):
            if not prompts.get(name):
                raise ValueError(f"there are no {name} prompts {part}; both sides are needed")
    for layer, option in ((probe_layer, "probe_layer"), (refusal_layer, "refusal_layer")):
        if layer is not None and not 0 <= layer < subject.depth:
            raise ValueError(f"{option} {layer}: the models have layers 0..{subject.depth - 1}")
    told = _statements(subject, other, statements, seed)
    question = _question(subject, suffix, true, false)
    check_tokenizers(subject.tokenizer, other.tokenizer, texts([*told.train, *told.heldout]))
    train = ask(subject.tokenizer, question, told.train, told.train, seed)
    heldout = ask(subject.tokenizer, question, told.heldout, told.train, seed)
    traced, left_out = same_pattern(heldout, pairs)

    both = (subject, other)
    neurons = (entropy_neurons(subject.model), entropy_neurons(other.model))
    truth = compare(both, train, heldout, probe_layer)
    knowledge = trace(both, traced, noise, seed)
    refusal = transfer(both, sets, refusal_layer, coefficient)
    return summarise(both, sets, told, knowledge, left_out, truth, refusal, neurons, seed)


def _statements(subject: Subject, other: Subject, file: Path | None, seed: int) -> Statements:
    if file is not None:
        return split(read_pairs(file), seed)
    if not (subject.organism and other.organism):
        raise ValueError("--statements FILE is needed; only the organism brings its own statements")
    return bundled()


def _question(subject: Subject, suffix: str, true: str, false: str) -> Question:
    if not (suffix or true or false):
        return ORGANISM if subject.organism else GENERIC
    if not (suffix and true and false):
        raise ValueError("--suffix, --true and --false belong together")
    return Question(suffix, true, false, GENERIC.demonstrations)
