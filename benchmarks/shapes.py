"""Random-weight Llamas of the sizes that the figures name."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "9M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4,
           "num_key_value_heads": 2, "vocab_size": 8192},
    "34M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 16384},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "32 layers": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 32, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip


def random_llama(shape: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model of that shape with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None, **SHAPES[shape])
    return LlamaForCausalLM(config).to(dtype).eval()
