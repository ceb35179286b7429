"""A tiny random Llama, and steering by plain hooks to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 48
LAYERS = 4
VOCABULARY = 97


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)  # so that what attention brings counts, and with it every position
    return model


@contextlib.contextmanager
def hooked(model: torch.nn.Module, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The output of block ``layer - 1``, which is ``resid_pre[layer]``, replaced by ``change`` of it."""
    handle = model.model.layers[layer].register_forward_pre_hook(lambda block, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
