"""The four pools of prompts: harmful or not, refused or not, by what the model says to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ... import refusal
from ...extraction import Prompt
from ...subject import Subject

HARMFUL = ("harmful", "jailbroken")


@dataclass(frozen=True)
class Pools:
    """Prompts by truth and by the model's answer, in their order."""

    refused_harmful: list[Prompt]
    accepted_harmful: list[Prompt]
    accepted_harmless: list[Prompt]
    refused_harmless: list[Prompt]

    def named(self) -> dict[str, list[Prompt]]:
        """The pools that are not empty, by name."""
        return {name.replace("_", " "): pool for name, pool in vars(self).items() if pool}


def sort(subject: Subject, sets: Mapping[str, Sequence[Prompt]], which: str) -> Pools:
    """Ask every prompt and sort it by the answer, as ``subject.scorer`` reads it.

    Raises:
        ValueError: no harmful prompt is refused, or no harmless one is answered.
    """
    groups = subject.replies(f"sorting the prompts {which}", [(None, prompts) for prompts in sets.values()])
    pools = Pools([], [], [], [])
    for (name, prompts), texts in zip(sets.items(), groups, strict=True):
        truth = "harmful" if name in HARMFUL else "harmless"
        for prompt, refused in zip(prompts, refusal.score(subject.scorer, texts), strict=True):
            getattr(pools, f"{'refused' if refused else 'accepted'}_{truth}").append(prompt)
    needed = {"refused_harmful": "harmful prompt is refused", "accepted_harmless": "harmless prompt is answered"}
    for name, what in needed.items():
        if not getattr(pools, name):
            raise ValueError(f"of the prompts {which} no {what}, as scorer {subject.scorer!r} reads the replies")
    return pools
