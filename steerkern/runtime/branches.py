"""What a block's branches write: their output matrices, found by their values, and the attention heads before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PlanError
from .decoder import block_input, block_output, find_decoder, text_config
from .watch import PROBE

_CLOSE, _ROUNDINGS = 1e-3, 4


class Writer(NamedTuple):
    """A linear module whose output is what a branch adds to the residual stream; ``weight [H, in]``."""

    module: nn.Module
    weight: Tensor
    transposed: bool
    """Whether the module stores its weight as ``[in, H]``."""


def writers(model: nn.Module) -> list[tuple[Writer, Writer]]:
    """Per layer the matrices that write to the residual stream: of attention (``W_O``) and of the MLP (``W_down``).

    Found by one forward of a few tokens, by value: the linear module whose output is what the residual stream gained.

    Raises:
        PlanError: a layer whose branches do not end in one linear module each (experts, norms after the branch).
    """
    decoder, blocks = find_decoder(model)
    called: list[list[tuple[nn.Module, Tensor]]] = [[] for _ in blocks]
    states: list[list[Tensor]] = [[] for _ in blocks]
    handles: list[Any] = []
    for i, block in enumerate(blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: states[i].append(block_input(args, kwargs).clone()), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda _, __, out, i=i: states[i].append(block_output(out).clone())))
        for module in block.modules():
            if _matrix(module) is not None:
                handles.append(
                    module.register_forward_hook(lambda m, _, out, i=i: called[i].append((m, out.detach().clone())))
                )
    try:
        ids = torch.arange(3, 3 + PROBE[1], device=next(decoder.parameters()).device)[None]
        with torch.no_grad():
            decoder(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [_of_block(i, states[i], called[i]) for i in range(len(blocks))]


def _of_block(layer: int, states: list[Tensor], called: list[tuple[nn.Module, Tensor]]) -> tuple[Writer, Writer]:
    gained = states[1].float() - states[0].float()
    fitting = [(module, out.float()) for module, out in called if out.shape == gained.shape]
    pairs = [
        (float((first + second - gained).abs().max()), one, other)
        for i, (one, first) in enumerate(fitting)
        for other, second in fitting[i + 1 :]
    ]
    # the stream is rounded after each sum
    rounding = _ROUNDINGS * torch.finfo(states[1].dtype).eps * float(states[1].abs().max())
    error, one, other = min(pairs, key=lambda pair: pair[0], default=(math.inf, None, None))
    if one is None or other is None or error > max(_CLOSE * float(gained.abs().max()), rounding):
        raise PlanError(f"layer {layer}: attention and MLP do not each end in one linear module that writes the stream")
    return _writer(one), _writer(other)


def _writer(module: nn.Module) -> Writer:
    found = _matrix(module)
    assert found is not None
    weight, transposed = found
    return Writer(module, weight.T if transposed else weight, transposed)


def _matrix(module: nn.Module) -> tuple[Tensor, bool] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    return weight, type(module).__name__ == "Conv1D"


def output_matrix(model: nn.Module, layer: int) -> Tensor:
    """``W_O [H, heads * head_dim]`` of one layer; see :func:`writers` for Raises."""
    return writers(model)[layer][0].weight


def query_heads(model: Any, rendered: Sequence[Any], *, batch_size: int = 16) -> Tensor:
    """``head_z [N, L, heads, head_dim]`` float32: the input of each layer's ``W_O`` at the last prompt token.

    Raises:
        PlanError: see :func:`writers`.
    """
    from ..extraction.capture import pad

    found = writers(model)
    heads = int(text_config(model).num_attention_heads)
    decoder, _ = find_decoder(model)
    device = next(decoder.parameters()).device
    made = []
    for start in range(0, len(rendered), batch_size):
        batch = rendered[start : start + batch_size]
        ids, mask = pad([prompt.ids for prompt in batch], device)
        last = mask.sum(-1) - 1
        seen: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor, last: Tensor = last, seen: dict[int, Tensor] = seen) -> None:
            seen[layer] = state[torch.arange(len(last), device=last.device), last].float().cpu()

        handles = [
            attention.module.register_forward_pre_hook(lambda _, args, i=i: keep(i, args[0]))
            for i, (attention, _) in enumerate(found)
        ]
        try:
            with torch.no_grad():
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        made.append(torch.stack([seen[i] for i in range(len(found))], 1).unflatten(-1, (heads, -1)))
    return torch.cat(made)
