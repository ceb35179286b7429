"""The refusal vector: rows of an embedding matrix, no activations (arXiv 2505.20309, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

REFUSALS = (
    "I cannot help with that.",
    "I can't assist with this.",
    "I'm sorry, but no.",
    "I am unable to do that.",
    "I will not provide this.",
    "I must decline.",
    "That is not something I can do.",
    "This request is harmful.",
)
ANSWERS = (
    "Sure, here is what you need.",
    "Of course, here it is.",
    "Certainly, let me explain.",
    "Yes, this is how it works.",
    "Happy to help with this.",
    "Here is a short overview.",
    "Let us begin with the first step.",
    "Great question.",
)
"""The paper's lists are not repeated here: these are steerkern's own, in their manner."""


def refusal_vector(
    model: Any,
    tokenizer: Any,
    refusals: Sequence[str] = REFUSALS,
    answers: Sequence[str] = ANSWERS,
    weights: Literal["unembed", "embed"] = "unembed",
) -> Tensor:
    """``d = mean_t W[t] (refusals) - mean_t W[t] (answers)``, of norm 1: float32 ``[H]`` on the CPU.

    The means run over all tokens of the phrases; ``W [V, H]`` is the output (``W_U``, the paper) or the input (``W_E``,
    its code) embedding. The two are one matrix in models that tie them.

    Raises:
        ValueError: no phrase, one without tokens, no such matrix, or equal means.
    """
    if weights not in ("unembed", "embed"):
        raise ValueError(f"weights must be 'unembed' or 'embed', got {weights!r}")
    module = model.get_output_embeddings() if weights == "unembed" else model.get_input_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(f"{type(model).__name__} has no {'output' if weights == 'unembed' else 'input'} embeddings")
    matrix = module.weight.detach()
    difference = _mean(matrix, tokenizer, refusals, "refusals") - _mean(matrix, tokenizer, answers, "answers")
    norm = difference.norm()
    if not bool(norm > 0):
        raise ValueError("refusals and answers have the same tokens, so there is no direction between them")
    vector: Tensor = (difference / norm).float()
    return vector


def _mean(matrix: Tensor, tokenizer: Any, phrases: Sequence[str], what: str) -> Tensor:
    if isinstance(phrases, str) or not phrases:
        raise ValueError(f"{what} must be a list of phrases, at least one, got {phrases!r}")
    ids: list[int] = []
    for phrase in phrases:
        found = tokenizer(phrase, add_special_tokens=False)["input_ids"]
        if not found:
            raise ValueError(f"{what}: {phrase!r} has no tokens")
        if max(found) >= len(matrix):
            raise ValueError(f"{what}: {phrase!r} has token {max(found)}, the model knows 0..{len(matrix) - 1}")
        ids += found
    rows = matrix[torch.tensor(ids, device=matrix.device)]
    return rows.to("cpu", torch.float64).mean(0)
