"""How strong: the largest scale of a plan that changes what is said to other prompts by no more than a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...extraction import Prompt
from ...logits import divergence, next_logprobs
from ...plan import Plan
from ...subject import Subject


@dataclass(frozen=True)
class Calibration:
    """The largest scale within the budget, and the KL (nats) there; ``curve`` has every scale that was tried."""

    scale: float
    kl: float
    curve: tuple[tuple[float, float], ...]


def calibrate(
    subject: Subject, plan: Plan, prompts: Sequence[Prompt], *, budget: float = 0.1, most: float = 4.0, steps: int = 8
) -> Calibration:
    """Bisect the scale of ``plan`` in ``(0, most]`` by the mean KL of the next token on ``prompts``.

    Raises:
        ValueError: a budget or an end that is not above 0.
    """
    if not (budget > 0 and most > 0 and steps > 0):
        raise ValueError(f"budget, most and steps must be above 0, got {budget}, {most} and {steps}")
    rendered = subject.render(prompts)
    (base,) = next_logprobs(subject.model, [(None, rendered)], batch_size=subject.batch_size)
    tried: list[tuple[float, float]] = []

    def at(scale: float) -> float:
        (found,) = next_logprobs(subject.model, [(plan.scaled(scale), rendered)], batch_size=subject.batch_size)
        tried.append((scale, float(divergence(base, found).mean())))
        return tried[-1][1]

    low, high, kl = 0.0, most, at(most)
    if kl <= budget:
        return Calibration(most, kl, tuple(tried))
    best = 0.0
    for _ in range(steps):
        middle = (low + high) / 2
        found = at(middle)
        if found <= budget:
            low, best = middle, found
        else:
            high = middle
    return Calibration(low, best, tuple(sorted(tried)))
