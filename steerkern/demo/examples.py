"""The prompts of the demo, in three splits, and how much of everything it runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..extraction import Prompt


@dataclass(frozen=True)
class Example:
    """A prompt and, where they are known, the exact replies that refuse it and comply with it."""

    prompt: Prompt
    refusing: str | None = None
    complying: str | None = None

    @property
    def text(self) -> str:
        """The request."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass(frozen=True)
class Examples:
    """Harmful and harmless prompts of one split."""

    harmful: tuple[Example, ...]
    harmless: tuple[Example, ...]


def prompts(examples: Sequence[Example]) -> list[Prompt]:
    """What is asked, without the replies."""
    return [example.prompt for example in examples]


@dataclass(frozen=True)
class Size:
    """How much the demo runs: prompts per split and side, points of a curve, timed rounds and their tokens."""

    train: int = 128
    validation: int = 32
    heldout: int = 64
    points: int = 13
    rounds: int = 20
    tokens: int = 64


QUICK = Size(train=48, validation=16, heldout=24, points=7, rounds=6, tokens=24)


def organism_examples(size: Size) -> dict[str, Examples]:
    """Prompts of the bundled organism: training pairs for extraction and choice, held-out pairs for the results."""
    from ..organism import grammar, vocabulary

    def reply(prompt: grammar.Prompt, behaviour: grammar.Behaviour) -> str:
        return grammar.retarget(prompt, expected=behaviour).reply

    def draw(kind: grammar.Kind, split: vocabulary.Split, skip: int, count: int) -> tuple[Example, ...]:
        drawn = grammar.prompts(kind, split, skip + count)[skip:]
        return tuple(Example(p.messages, reply(p, "refuse"), reply(p, "comply")) for p in drawn)

    parts: dict[str, tuple[vocabulary.Split, int, int]] = {
        "train": ("train", 0, size.train),
        "validation": ("train", size.train, size.validation),
        "heldout": ("heldout", 0, size.heldout),
    }
    return {name: Examples(draw("harmful", *part), draw("harmless", *part)) for name, part in parts.items()}


def split_examples(harmful: Sequence[str], harmless: Sequence[str], size: Size, seed: int = 0) -> dict[str, Examples]:
    """Shuffle prompts and divide them: a quarter held out, a quarter for validation, the rest for extraction.

    Raises:
        ValueError: fewer than 8 different prompts on a side.
    """
    sides = []
    for name, texts in (("harmful", harmful), ("harmless", harmless)):
        distinct = list(dict.fromkeys(texts))
        if len(distinct) < 8:
            raise ValueError(f"the demo needs at least 8 different {name} prompts, got {len(distinct)}")
        random.Random(f"{name} {seed}").shuffle(distinct)
        quarter = len(distinct) // 4
        heldout, validation = distinct[:quarter], distinct[quarter : 2 * quarter]
        kept = (distinct[2 * quarter :][: size.train], validation[: size.validation], heldout[: size.heldout])
        sides.append([tuple(map(Example, part)) for part in kept])
    return {name: Examples(*pair) for name, *pair in zip(("train", "validation", "heldout"), *sides, strict=True)}
