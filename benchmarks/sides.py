"""What several suites compare a steered model with, and what must hold before they time it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import LlamaForCausalLM

import steerkern as sk
from steerkern.timing import ablation_hooks


@contextlib.contextmanager
def unsteered(model: LlamaForCausalLM, plan: sk.Plan, batch: int) -> Iterator[None]:
    """Our norms everywhere, no row steered: what the fusion gives by itself."""
    with sk.steer(model, plan, silent="ignore") as session:
        session.rows([None] * batch)
        yield


@contextlib.contextmanager
def a_plan_each(model: LlamaForCausalLM, plans: list[sk.Plan], batch: int) -> Iterator[None]:
    """All plans held, every row under one of its own."""
    with sk.steer(model, plans, silent="ignore") as session:
        session.rows([plan.name for plan in plans[-batch:]])
        yield


@contextlib.contextmanager
def warmed(model: LlamaForCausalLM, setting: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """The setting after one forward of a token, which pays what a session puts off until its first."""
    with setting():
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long))
        yield


def correct(model: LlamaForCausalLM, inputs: dict[str, Any], plan: sk.Plan, unit: torch.Tensor) -> None:
    """Before anything is timed: against the model in fp64 the session errs no more than the hook, and both steer."""
    dtype = model.dtype

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits.double()

    with ablation_hooks(model, unit):
        hook = logits()
    with sk.steer(model, plan):
        steered = logits()
    model.double()
    plain = logits()
    with ablation_hooks(model, unit):
        exact = logits()
    model.to(dtype)
    ours, theirs, effect = (float((x - exact).abs().mean()) for x in (steered, hook, plain))
    assert ours <= 1.25 * theirs, (ours, theirs)  # both round at random; the session once less often per layer
    assert effect > 2 * ours, (effect, ours)


def independent(model: LlamaForCausalLM, inputs: dict[str, Any], plans: list[sk.Plan]) -> None:
    """Before anything is timed: a row under its own plan has the bits of a batch that is all under that plan."""
    rows = inputs["input_ids"].shape[0]

    def logits(names: list[str]) -> torch.Tensor:
        with torch.no_grad(), sk.steer(model, plans, silent="ignore") as session:
            session.rows(names)
            return model(**inputs).logits

    names = [plan.name for plan in plans[-rows:]]
    together = logits(names)
    for row in {0, rows - 1}:
        assert torch.equal(together[row], logits([names[row]] * rows)[row]), row
    assert not torch.equal(together[-1], logits([plans[0].name] * rows)[-1])


def against_itself(benchmark: Any) -> float:
    """The noise of rounds that time one thing alone: the median of every other round over that of the rest."""
    seconds = benchmark.stats.stats.data
    return round(statistics.median(seconds[1::2]) / statistics.median(seconds[::2]), 3)
