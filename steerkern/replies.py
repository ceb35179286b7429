"""Greedy replies of a model to many prompts, batch by batch, each prompt under its own plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .extraction.capture import check_prompts
from .extraction.template import Rendered
from .plan import Plan
from .runtime.session import Session


def replies(
    model: Any,
    tokenizer: Any,
    rendered: Sequence[Rendered],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    session: Session | None = None,
    rows: Sequence[str | Plan | Iterable[str | Plan] | None] | None = None,
    step: Callable[[int], object] | None = None,
) -> list[str]:
    """What the model says to each prompt, without special tokens.

    Prompts go through ``model.generate`` in batches, padded on the left, in their order.

    Args:
        model: a transformers causal language model; a session may be attached.
        tokenizer: decodes the replies.
        rendered: the prompts, from :func:`~steerkern.extraction.template.render`.
        max_new_tokens: replies end there at the latest.
        batch_size: prompts per call.
        session: the session to give ``rows`` to; it has no assigned rows afterwards.
        rows: per prompt its plans by name, or None for the bare model; needs ``session``.
        step: called with the number of prompts of each batch that is done.

    Raises:
        ValueError: prompts that the model cannot read, ``rows`` of another length or without a session.
    """
    if rows is not None and (session is None or len(rows) != len(rendered)):
        raise ValueError(f"rows need a session and one entry per prompt, got {len(rows)} for {len(rendered)} prompts")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    check_prompts(model, rendered)
    texts: list[str] = []
    try:
        for start in range(0, len(rendered), batch_size):
            batch = rendered[start : start + batch_size]
            if session is not None and rows is not None:
                session.rows(rows[start : start + batch_size])
            inputs = encode(model, batch)
            with torch.no_grad():
                made = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            texts += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if step is not None:
                step(len(batch))
    finally:
        if session is not None and rows is not None:
            session.rows(None)
    return texts


def encode(model: Any, rendered: Sequence[Rendered]) -> dict[str, Any]:
    """What ``generate`` takes: ``input_ids`` and ``attention_mask`` ``[B, S]``, padded on the left, and the pad id."""
    pad, width = pad_token(model), max(len(prompt.ids) for prompt in rendered)
    ids = torch.tensor([[pad] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in rendered])
    mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in rendered])
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "pad_token_id": pad}


def pad_token(model: Any) -> int:
    """The model's padding token, else its first end-of-text token, else 0: padded tokens are never shown."""
    config = model.generation_config
    for found in (config.pad_token_id, config.eos_token_id):
        if isinstance(found, (list, tuple)):
            found = found[0] if found else None
        if found is not None:
            return int(found)
    return 0
