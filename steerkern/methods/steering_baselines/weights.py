"""Ablation as weights: every matrix that writes to the residual stream writes nothing along a direction any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...directions import Direction
from ...errors import PlanError
from ...runtime.branches import writers


def orthogonalise(model: Any, direction: Tensor | Direction) -> Any:
    """``W <- W - r r^T W`` on ``W_E``, every ``W_O`` and ``W_down``, and their biases, in place (arXiv 2406.11717, E).

    The same function as :func:`~steerkern.methods.steering_baselines.constructions.ablation`, as a checkpoint that
    runs anywhere: ``orthogonalise(model, r).save_pretrained(folder)``. Embeddings that are tied to the output are
    untied first, because ablation leaves ``W_U`` alone.

    Args:
        model: a transformers model; no session may be attached.
        direction: ``r [H]``, of any norm.

    Returns:
        the model.

    Raises:
        PlanError: branches that do not end in one linear module, or a direction of another width; nothing changed then.
    """
    raw = direction.raw if isinstance(direction, Direction) else direction
    embeddings = model.get_input_embeddings()
    if raw.dim() != 1 or len(raw) != embeddings.weight.shape[1]:
        raise PlanError(f"the direction has shape {list(raw.shape)}, the model's width is {embeddings.weight.shape[1]}")
    unit = (raw.double() / raw.double().norm()).to(embeddings.weight.device)
    found = writers(model)
    output = model.get_output_embeddings()
    if output is not None and output.weight is embeddings.weight:
        output.weight = nn.Parameter(embeddings.weight.detach().clone())
        model.config.tie_word_embeddings = False
        if hasattr(model.config, "get_text_config"):
            model.config.get_text_config().tie_word_embeddings = False
    with torch.no_grad():
        _remove(embeddings.weight, unit, rows=True)
        for pair in found:
            for writer in pair:
                _remove(writer.module.weight, unit, rows=writer.transposed)
                if getattr(writer.module, "bias", None) is not None:
                    _remove(writer.module.bias, unit, rows=True)
    return model


def _remove(weight: Any, unit: Tensor, *, rows: bool) -> None:
    """Project ``unit [H]`` out of the rows ``[..., H]`` or the columns ``[H, ...]`` of a parameter."""
    w = weight.double()
    weight.copy_(w - torch.outer(w @ unit, unit) if rows and w.dim() == 2 else _of_columns(w, unit))


def _of_columns(w: Tensor, unit: Tensor) -> Tensor:
    return w - (w @ unit) * unit if w.dim() == 1 else w - torch.outer(unit, unit @ w)
