"""A model and a configuration of vLLM's shape, without vLLM: blocks that hand on ``(x, residual)``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, LAYERS = 32, 3


class RMSNorm(nn.Module):
    """As vLLM's: callable with one tensor or two, its code behind ``_forward_method``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-6
        self._forward_method = self.forward_native

    def forward(self, *args: Tensor) -> Any:
        return self._forward_method(*args)

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        h = x if residual is None else x + residual
        normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        return normed if residual is None else (normed, h)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        self.attention, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.attention(x), residual)
        return self.mlp(x), residual


class Model(nn.Module):
    """Tokens do not see each other, which is all that these tests need."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(block(width) for _ in range(layers))
        self.norm = RMSNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, residual = self.embed(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        out: Tensor = self.norm(x, residual)[0]
        return out


def config(steerkern: Any = None, **changed: Any) -> Any:
    """An engine's configuration, as far as the plugin looks at it."""
    parallel = {"use_ubatching": False, "prefill_context_parallel_size": 1, "pipeline_parallel_size": 1}
    text = SimpleNamespace(hidden_size=WIDTH, num_hidden_layers=LAYERS)
    made = {
        "additional_config": {} if steerkern is None else {"steerkern": steerkern},
        "parallel_config": SimpleNamespace(**{k: changed.get(k, v) for k, v in parallel.items()}),
        "compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=changed.get("enable_sp", False))),
        "kv_transfer_config": changed.get("kv_transfer_config"),
        "speculative_config": changed.get("speculative_config"),
        "model_config": SimpleNamespace(hf_text_config=text),
    }
    return SimpleNamespace(**made)
