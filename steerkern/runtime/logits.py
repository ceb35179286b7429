"""Logits of the next token, without those of all the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def next_logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits ``[B, V]`` float32 after the last token of each row, from one forward without cache and gradient.

    ``ids [B, S]`` and ``mask [B, S]`` int64, 0 at padding; padded on the right, so that positions count from the
    first token in every model. Only the columns where some row ends go through the unembedding.
    """
    last = ids.new_full((len(ids),), ids.shape[1] - 1) if mask is None else _last(mask)
    columns, of_row = torch.unique(last, return_inverse=True)
    with torch.no_grad():
        made = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns).logits
    found: Tensor = made[torch.arange(len(ids), device=made.device), of_row].float()
    return found


def _last(mask: Tensor) -> Tensor:
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1) - 1
