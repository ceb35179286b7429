"""Tiny random models of decoder families that vLLM's CPU attention takes: heads of 32."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

WIDTH = 64
LAYERS = 4
VOCABULARY = 512

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that greedy tokens differ
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, eq=False)
class Family:
    """One family: its config class and what differs from :data:`BASE`."""

    name: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mid: bool = True
    """Whether a norm of vLLM's block adds what attention brings to the stream."""

    def __str__(self) -> str:
        return self.name


MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
WINDOW = {"sliding_window": 32}

FAMILIES = [
    Family("llama", "LlamaConfig"),
    Family("mistral", "MistralConfig", {"sliding_window": None}),
    Family("qwen2", "Qwen2Config"),
    Family("qwen3", "Qwen3Config"),
    Family("gemma", "GemmaConfig"),
    Family("gemma2", "Gemma2Config", {**WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    Family("gemma3_text", "Gemma3TextConfig", {**WINDOW, "query_pre_attn_scalar": 32}),
    Family("phi3", "Phi3Config"),
    Family("granite", "GraniteConfig", {"residual_multiplier": 0.5}, mid=False),
    Family("mixtral", "MixtralConfig", MOE),
    Family("qwen3_moe", "Qwen3MoeConfig", MOE),
    Family("gpt2", "GPT2Config", {"n_positions": 256, "n_inner": 128}, mid=False),
]
LLAMA = FAMILIES[0]
REFUSED = [
    (Family("olmo2", "Olmo2Config"), "no norm reads what the block is given"),
    (Family("cohere", "CohereConfig"), "no norm reads what the block is given"),
]


@functools.cache
def saved(family: Family) -> Path:
    """The folder of the model, its norms' weights random."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**{**BASE, **family.options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = Path(tempfile.mkdtemp(prefix=f"{family.name}-"))
    model.float().save_pretrained(folder)
    return folder
