"""What a model would say next: logits of many prompts at their last token, each under its own plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .extraction.capture import check_prompts
from .extraction.template import Rendered
from .plan import Plan
from .replies import encode
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
        inputs = encode(model, [prompt for _, prompt in batch])
        inputs.pop("pad_token_id")
        here = {plan.name for plan, _ in batch if plan is not None}
        if not here:
            found.append(_last(model, inputs))
        else:
            with steer(model, [plans[name] for name in here], silent="ignore") as session:
                session.rows([None if plan is None else plan.name for plan, _ in batch])
                found.append(_last(model, inputs))
        if step is not None:
            step(len(batch))
    together = torch.cat(found)
    return list(together.split([len(prompts) for _, prompts in named]))


def _last(model: Any, inputs: dict[str, Any]) -> Tensor:
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
    return functional.log_softmax(logits.float(), -1).cpu()


def log_odds(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    """``log p - log(1 - p)`` of the summed probability ``p`` of ``tokens``, ``[N]`` of ``[N, V]``.

    The refusal score of arXiv 2406.11717, where ``tokens`` are the first tokens of a family's refusals.
    """
    p = logprobs[:, list(tokens)].double().exp().sum(-1).clamp(1e-12, 1 - 1e-12)
    return (p.log() - (1 - p).log()).float()


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """``KL(base || other) [N]`` in nats, of log-probabilities ``[N, V]``."""
    return (base.double().exp() * (base.double() - other.double())).sum(-1).clamp_min(0).float()
