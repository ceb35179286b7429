"""What a model would say next: log-probabilities of the first reply token, each prompt under its own plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .extraction.capture import check_prompts, pad
from .extraction.template import Rendered
from .plan import Plan
from .runtime.logits import next_logits
from .runtime.session import steer


def next_logprobs(
    model: Any,
    groups: Sequence[tuple[Plan | None, Sequence[Rendered]]],
    *,
    batch_size: int = 16,
    step: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Log-probabilities of the first reply token, float32 ``[N, V]`` on the CPU per group of prompts and its plan.

    Raises:
        ValueError: prompts that the model cannot read.
        PlanError: a plan that does not fit the model.
    """
    named = [(None if plan is None else plan.named(f"{i}"), list(prompts)) for i, (plan, prompts) in enumerate(groups)]
    whole = [(plan, prompt) for plan, prompts in named for prompt in prompts]
    check_prompts(model, [prompt for _, prompt in whole])
    found: list[Tensor] = []
    # sets in pieces, so that the slot table holds their plans
    plans = {plan.name: plan for plan, _ in named if plan is not None}
    for start in range(0, len(whole), batch_size):
        batch = whole[start : start + batch_size]
        ids, mask = pad([prompt.ids for _, prompt in batch], next(model.parameters()).device)
        here = {plan.name for plan, _ in batch if plan is not None}
        if not here:
            found.append(next_logits(model, ids, mask))
        else:
            with steer(model, [plans[name] for name in here], silent="ignore") as session:
                session.rows([None if plan is None else plan.name for plan, _ in batch])
                found.append(next_logits(model, ids, mask))
        if step is not None:
            step(len(batch))
    together = functional.log_softmax(torch.cat([logits.cpu() for logits in found]), -1)
    return list(together.split([len(prompts) for _, prompts in named]))


def log_odds(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    """``log p - log(1 - p)`` of the summed probability ``p`` of ``tokens``, ``[N]`` of ``[N, V]``.

    The refusal score of arXiv 2406.11717, where ``tokens`` are the first tokens of a family's refusals.
    """
    p = logprobs[:, list(tokens)].double().exp().sum(-1).clamp(1e-12, 1 - 1e-12)
    return (p.log() - (1 - p).log()).float()


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """``KL(base || other) [N]`` in nats, of log-probabilities ``[N, V]``."""
    return (base.double().exp() * (base.double() - other.double())).sum(-1).clamp_min(0).float()
