"""The names under which a manager's prefix cache knows the blocks of a steered request.

Blocks of the key-value cache are shared between requests whose tokens are equal, which is wrong where they are steered
by other plans: what a plan wrote is in the keys. So blocks are looked up and registered under other token numbers from
the first token on that a plan may write, and under others again from where that depends on the prompt's length, as the
reply to one prompt may be part of the next: requests share a block exactly where the steering that touched it is the
same.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ..packing import Held
from ..program import Program
from ..steps import Step
from .batch import Batch
from .prompts import Prompts


class BlockNames:
    """Names of the blocks of one request, whose plans and strengths are those of the moment when this is made."""

    def __init__(self, program: Program, batch: Batch) -> None:
        self.program = program
        self.batch = batch
        self._made = [(held, held.changes) for held in self._held()]
        self._digest = " ".join(sorted(f"{held.plan.digest} {held.scale!r}" for held, _ in self._made))

    @property
    def changed(self) -> bool:
        """Whether plans or strengths are, or were on the way, others than when the request was added."""
        now = [(held, held.changes) for held in self._held()]
        return len(now) != len(self._made) or any(
            one is not other or changes != before
            for (one, changes), (other, before) in zip(now, self._made, strict=True)
        )

    @property
    def reads_early(self) -> bool:
        """Whether a decision reads another state than the last prompt token's, which is never taken from the cache."""
        return any(read.token != -1 for step in self.batch.steps() for d in step.decisions for read in d.reads)

    def rename(self, tokens: list[int], page: int) -> list[int]:
        """The numbers under which blocks of ``page`` tokens are known."""
        steps, prompts = self.batch.steps(), self.batch.prompts
        if self.changed:  # the tokens may have been written in any way: nobody else has such blocks
            return _renumbered(tokens, f"{self._digest} {self.batch.number}")
        first = min((first_written(step, prompts) for step in steps), default=len(tokens))
        last = min((first_by_length(step, prompts) for step in steps), default=len(tokens))
        start = min(first // page * page, len(tokens))
        end = min(max(start, last // page * page), len(tokens))
        same = _renumbered(tokens[start:end], self._digest)
        return [*tokens[:start], *same, *_renumbered(tokens[end:], f"{self._digest} {prompts.length}")]

    def _held(self) -> list[Held]:
        names = (self.batch.plans or [tuple(plan.name for plan in self.program.plans)])[0]
        return [self.program.get(name) for name in names]


def first_written(step: Step, prompts: Prompts) -> int:
    """The first position that a step may write of a request; an event may come at any of them.

    Raises:
        PlanError: a position that the prompt does not have.
    """
    tokens = step.tokens
    start = tokens.start if tokens.start >= 0 else max(0, prompts.length + tokens.start)
    if tokens.positions is not None:
        return max(start, min(int(prompts.place(position)[0]) for position in tokens.positions))
    return max(start, {"decode": prompts.length, "reply": prompts.length - 1}.get(tokens.phase, 0))


def first_by_length(step: Step, prompts: Prompts) -> int:
    """The first position at which a step does another thing in a longer prompt that begins alike."""
    tokens, length = step.tokens, prompts.length
    ends = [length + p for p in tokens.positions or () if p < 0]
    ends += [length + bound for bound in (tokens.start, tokens.stop or 0) if bound < 0]
    if tokens.positions is None and tokens.phase != "all":
        ends.append(length - 1 if tokens.phase == "reply" else length)
    return max(0, min(ends)) if ends else _NEVER


_NEVER = 2**62


def depends_on_length(step: Step) -> bool:
    """Whether a step treats a token in another way once the reply it stands in is part of a longer prompt."""
    return first_by_length(step, Prompts.of(1, 1, None)) < _NEVER


def _renumbered(tokens: list[int], version: str) -> list[int]:
    """Token numbers mixed with the digest: equal where both are."""
    words = np.frombuffer(hashlib.shake_256(version.encode()).digest(4 * len(tokens)), np.uint32) >> 1
    mixed: list[int] = (np.array(tokens, np.int64) ^ words).tolist()
    return mixed
