"""The decoder inside a model, its blocks, and the state that goes in and out of them."""

from __future__ import annotations

import contextlib
from typing import Any, TypeGuard

from torch import Tensor, nn

from ..errors import PlanError


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside ``model``."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"steerkern steers transformers models, got {type(model).__name__} without a config")
    return config.get_text_config(decoder=True)


def find_decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the decoder blocks, and the blocks.

    Raises:
        TypeError, PlanError: not a transformers model, an encoder-decoder, or no list of that many blocks.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise PlanError(f"{type(model).__name__} is an encoder-decoder; steerkern steers decoder-only models")
    count = int(config.num_hidden_layers)
    roots = [model]
    with contextlib.suppress(AttributeError, NotImplementedError):
        if isinstance(decoder := model.get_decoder(), nn.Module):  # type: ignore[operator]
            roots.insert(0, decoder)
    first = None
    for owner in (module for root in roots for module in root.modules()):
        for blocks in owner._modules.values():
            if _is_stack(blocks, count):
                if getattr(owner, "config", None) is config:
                    return owner, blocks
                first = first or (owner, blocks)  # may be a vision tower with as many layers
    if first is None:
        raise PlanError(f"{type(model).__name__} has no list of {count} decoder blocks")
    return first


def _is_stack(blocks: nn.Module | None, count: int) -> TypeGuard[nn.ModuleList]:
    # a list of per-layer embeddings or projections also has one item per layer; a block has parts
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != count:
        return False
    return all(block._modules for block in blocks)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual state that a block was called with: its first argument, or the one named ``hidden_states``."""
    state = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(state, Tensor):
        raise PlanError(f"a block was called without its state as first argument, got {type(state).__name__}")
    return state


def block_output(output: Any) -> Tensor:
    """The residual state that a block returned: a tensor (transformers 5), or the first item of a tuple."""
    state = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(state, Tensor):
        raise PlanError(f"a block returned no state, got {type(state).__name__}")
    return state
