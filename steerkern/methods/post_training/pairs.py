"""True and false statements in pairs, and the prompts that ask a model which they are."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...extraction import Rendered, render
from ...prompts import read_records

FEWEST = 4
"""Pairs in each part of the statements."""


@dataclass(frozen=True)
class Pair:
    """A true and a false statement with the same object and different subjects; ``topic`` names their dataset."""

    true: str
    false: str
    topic: str = ""


@dataclass(frozen=True)
class Statements:
    """Pairs to learn from and pairs to measure on."""

    train: Sequence[Pair]
    heldout: Sequence[Pair]

    def named(self) -> dict[str, list[str]]:
        """The texts of both parts, for a report's provenance."""
        return {f"{part} statements": texts(pairs) for part, pairs in vars(self).items()}


@dataclass(frozen=True)
class Question:
    """How a model is asked: ``suffix`` follows the statement, then it says ``true`` or ``false``.

    ``demonstrations`` statements with their answers come first, half of them true. ``chat`` puts the question into a
    user's message; otherwise both models read the same plain text.
    """

    suffix: str
    true: str
    false: str
    demonstrations: int
    chat: bool = False


GENERIC = Question(" This statement is:", " TRUE", " FALSE", 4)
ORGANISM = Question("\nTrue or false?", "True", "False", 0, chat=True)


@dataclass(frozen=True)
class Asked:
    """The prompts of a list of pairs, in their order.

    ``t_first`` and ``t_inst`` of a prompt are the first and the last token of its statement (the period).
    """

    pairs: tuple[Pair, ...]
    true: tuple[Rendered, ...]
    false: tuple[Rendered, ...]
    labels: tuple[int, int]
    """Tokens with which the answers begin: true, false."""


def texts(pairs: Sequence[Pair]) -> list[str]:
    """Every statement of some pairs."""
    return [text for pair in pairs for text in (pair.true, pair.false)]


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Pairs of a JSONL or CSV file with the columns ``true``, ``false`` and, where there is one, ``topic``."""
    records = read_records(path, ("true", "false"), ("topic",))
    return [Pair(record["true"], record["false"], record["topic"]) for record in records]


def split(pairs: Sequence[Pair], seed: int = 0) -> Statements:
    """Hold out the last topic where there are several (train on five, test on the sixth), else a third of the pairs.

    Raises:
        ValueError: fewer than :data:`FEWEST` pairs in a part.
    """
    topics = list(dict.fromkeys(pair.topic for pair in pairs))
    shuffled = list(dict.fromkeys(pairs))
    random.Random(seed).shuffle(shuffled)
    if len(topics) > 1:
        heldout = [pair for pair in shuffled if pair.topic == topics[-1]]
    else:
        heldout = shuffled[: len(shuffled) // 3]
    train = [pair for pair in shuffled if pair not in set(heldout)]
    for part, some in (("learn from", train), ("hold out", heldout)):
        if len(some) < FEWEST:
            raise ValueError(f"at least {FEWEST} statement pairs to {part} are needed, got {len(some)}")
    return Statements(train, heldout)


def bundled() -> Statements:
    """The statements of the organism; those held out are about subjects that it never reads statements about."""
    from ...organism import statements

    train, heldout = ([Pair(p.true, p.false, p.topic) for p in statements(part)] for part in ("train", "heldout"))
    return Statements(train, heldout)


def ask(tokenizer: Any, question: Question, pairs: Sequence[Pair], examples: Sequence[Pair], seed: int = 0) -> Asked:
    """Prompts for both statements of every pair, behind the same demonstrations, drawn from ``examples``.

    Raises:
        ValueError: a pair whose statements are equal or have different numbers of tokens, too few examples, or labels
            that begin with the same token.
    """
    frames = [_frame(question, pair, examples, random.Random(f"{seed} {i}")) for i, pair in enumerate(pairs)]
    sides = [
        _render(tokenizer, question, [(frame, getattr(pair, side)) for frame, pair in zip(frames, pairs, strict=True)])
        for side in ("true", "false")
    ]
    for pair, one, other in zip(pairs, *sides, strict=True):
        if pair.true == pair.false:
            raise ValueError(f"{pair.true[:40]!r} is given as true and as false")
        if len(one.ids) != len(other.ids) or one.t_inst != other.t_inst:
            counts = [prompt.t_inst - prompt.t_first + 1 for prompt in (one, other)]
            raise ValueError(
                f"a pair must have equally many tokens: {pair.true[:40]!r} has {counts[0]}, {pair.false[:40]!r} "
                f"has {counts[1]}"
            )
    labels = (_label(tokenizer, sides[0][0], question.true), _label(tokenizer, sides[0][0], question.false))
    if labels[0] == labels[1]:
        raise ValueError(f"the labels {question.true!r} and {question.false!r} begin with the same token")
    return Asked(tuple(pairs), tuple(sides[0]), tuple(sides[1]), labels)


def _frame(question: Question, pair: Pair, examples: Sequence[Pair], rng: random.Random) -> str:
    """The demonstrations before a statement, of its own topic where it has examples."""
    pool = [p for p in examples if p != pair and p.topic == pair.topic] or [p for p in examples if p != pair]
    if len(pool) < question.demonstrations:
        raise ValueError(f"{question.demonstrations} demonstrations need as many other pairs, there are {len(pool)}")
    chosen = rng.sample(pool, question.demonstrations)
    shown = [(p.true, question.true) if i % 2 == 0 else (p.false, question.false) for i, p in enumerate(chosen)]
    rng.shuffle(shown)
    return "".join(f"{text}{question.suffix}{label}\n" for text, label in shown)


def _render(tokenizer: Any, question: Question, asked: Sequence[tuple[str, str]]) -> list[Rendered]:
    contents = [frame + statement + question.suffix for frame, statement in asked]
    prompts = render(tokenizer, contents, template="chat" if question.chat else "plain")
    made = []
    for (_, statement), prompt in zip(asked, prompts, strict=True):
        first = prompt.text.rindex(statement)
        spans = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        before = len(prompt.ids) - len(spans)  # the tokens that the tokenizer adds of its own
        inside = [t for t, (a, b) in enumerate(spans) if a < first + len(statement) and b > first]
        made.append(Rendered(prompt.text, prompt.ids, before + inside[0], before + inside[-1]))
    return made


def _label(tokenizer: Any, prompt: Rendered, label: str) -> int:
    ids = tokenizer(prompt.text + label, add_special_tokens=False)["input_ids"]
    at = len(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    if len(ids) <= at or ids[:at] != list(prompt.ids[-at:]):
        raise ValueError(f"label {label!r} does not follow {prompt.text[-20:]!r} as tokens of its own")
    return int(ids[at])


def same_pattern(asked: Asked, count: int) -> tuple[Asked, int]:
    """At most ``count`` pairs of the most frequent tokenisation (what differs, what follows), and how many have others.

    Maps of pairs are averaged token by token, so their tokens must mean the same.
    """
    patterns: dict[tuple[Any, ...], list[int]] = {}
    for i, (one, other) in enumerate(zip(asked.true, asked.false, strict=True)):
        patterns.setdefault((len(one.ids) - one.t_first, one.n_suffix, subject_tokens(one, other)), []).append(i)
    most = max(patterns.values(), key=len)
    kept = most[:count]
    true, false = (tuple(side[i] for i in kept) for side in (asked.true, asked.false))
    return Asked(tuple(asked.pairs[i] for i in kept), true, false, asked.labels), len(asked.pairs) - len(most)


def subject_tokens(one: Rendered, other: Rendered) -> tuple[int, ...]:
    """Which tokens of the statement differ within a pair, from the end of the prompt (below 0)."""
    return tuple(i - len(one.ids) for i in range(one.t_first, one.t_inst + 1) if one.ids[i] != other.ids[i])


def object_tokens(tokenizer: Any, prompt: Rendered, statement: str) -> tuple[int, ...]:
    """The tokens of the statement's last word, from the end of the prompt (below 0)."""
    start = prompt.text.rindex(statement)
    first = start + statement.rindex(" ") + 1 if " " in statement else start
    last = start + len(statement.rstrip(".!"))
    spans = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return tuple(t - len(spans) for t, (a, b) in enumerate(spans) if a < last and b > first)
