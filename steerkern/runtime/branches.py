"""What a block's branches write: their output matrices, found by their values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PlanError
from .decoder import block_input, block_output, find_decoder
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
