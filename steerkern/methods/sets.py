"""The prompts that a system works on: sets by name, each with a part to learn from and a part that is held out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..extraction import Prompt
from ..subject import request

NAMES = ("harmful", "harmless", "jailbroken", "overrefused")
"""Requests to refuse and to answer; harmful ones that the model answers; harmless ones that it refuses."""
FEWEST = 8


@dataclass(frozen=True)
class Sets:
    """Sets of prompts by name: ``train`` to learn from, ``heldout`` to measure on; no prompt is in both."""

    train: Mapping[str, Sequence[Prompt]]
    heldout: Mapping[str, Sequence[Prompt]]
    labels: Mapping[str, str] = field(default_factory=dict)
    """Category of a harmful request, by its text (:func:`~steerkern.subject.request`), where it is known."""

    def named(self) -> dict[str, Sequence[Prompt]]:
        """Both parts by one name each, for a report's provenance."""
        parts = {"train": self.train, "heldout": self.heldout}
        return {f"{part} {name}": prompts for part, sets in parts.items() for name, prompts in sets.items()}


def split(
    given: Mapping[str, Sequence[str]], count: int, seed: int = 0, labels: Mapping[str, str] | None = None
) -> Sets:
    """Shuffle each set and hold out a third of it; at most ``count`` prompts in each part.

    Raises:
        ValueError: fewer than :data:`FEWEST` different prompts in a set, or one prompt in two sets.
    """
    train: dict[str, Sequence[Prompt]] = {}
    heldout: dict[str, Sequence[Prompt]] = {}
    seen: dict[str, str] = {}
    for name, prompts in given.items():
        distinct = list(dict.fromkeys(prompts))
        if len(distinct) < FEWEST:
            raise ValueError(f"at least {FEWEST} different {name} prompts are needed, got {len(distinct)}")
        for prompt in distinct:
            if seen.setdefault(prompt, name) != name:
                raise ValueError(f"{prompt[:40]!r} stands in both {seen[prompt]} and {name}")
        random.Random(f"{name} {seed}").shuffle(distinct)
        kept = len(distinct) // 3
        heldout[name], train[name] = distinct[:kept][:count], distinct[kept:][:count]
    return Sets(train, heldout, labels or {})


def bundled(count: int, model: str = "planted") -> Sets:
    """Prompts of an organism, of the names in :data:`NAMES`; its held-out pairs are those that it never saw.

    The thinking one answers harmful requests with another marker, and refuses no harmless ones.
    """
    from ..organism import grammar, vocabulary

    kinds: dict[str, tuple[Any, bool]] = {
        "harmful": ("harmful", True),
        "harmless": ("harmless", False),
        "jailbroken": ("jailbreak", True),
        "overrefused": ("strict", False),
    }
    if model == "thinking":
        kinds = {name: kinds[name] for name in ("harmful", "harmless")} | {"jailbroken": ("cliff", True)}

    labels: dict[str, str] = {}

    def draw(part: vocabulary.Split) -> dict[str, Sequence[Prompt]]:
        drawn: dict[str, Sequence[Prompt]] = {}
        for name, (kind, harmful) in kinds.items():
            rng = random.Random(f"{kind} {part} {harmful}")
            prompts = [grammar.draw(kind, part, rng, harmful) for _ in range(count)]
            drawn[name] = [prompt.messages for prompt in prompts]
            if harmful:
                taking = ("taking something", "making something bad")
                labels.update({request(p.messages): taking[p.verb not in vocabulary.TAKE] for p in prompts})
        return drawn

    return Sets(draw("train"), draw("heldout"), labels)
