"""Tiny random models of many decoder families, and where the residual stream can be edited in each.

``fused`` has one letter per site, ``resid_pre`` of every block and then ``resid_post`` of the last: ``F`` fused into a
norm, ``d`` edited at the block's door. ``mid`` has one per block: ``F`` fused, ``-`` no such site.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

WIDTH = 32
VOCABULARY = 96

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: the config class, what differs from :data:`BASE`, and what must be found in it."""

    name: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fused: str = "FFFF"
    mid: str = "FFF"
    dtype: torch.dtype = torch.float32
    model: str = "AutoModelForCausalLM"
    drop: tuple[str, ...] = ()
    """Options of :data:`BASE` that the config refuses."""

    def __str__(self) -> str:
        return self.name


def build(family: Family) -> nn.Module:
    """The model in eval mode, its norms' weights away from their initial ones and zeros; skips what is not installed."""
    if not hasattr(transformers, family.config):
        pytest.skip(f"transformers {transformers.__version__} has no {family.config}")
    options = {**{k: v for k, v in BASE.items() if k not in family.drop}, **family.options}
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**options)
    model = getattr(transformers, family.model)
    model = model.from_config(config) if family.model.startswith("Auto") else model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(family.dtype).eval()


MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
         "mamba_n_groups": 1, "mamba_chunk_size": 4}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "linear_conv_kernel_dim": 4}  # fmt: skip
GPT2 = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
PARALLEL = "---"

FAMILIES = [
    Family("llama", "LlamaConfig"),
    Family("llama-bf16", "LlamaConfig", dtype=torch.bfloat16),
    Family("mistral", "MistralConfig", {"sliding_window": 8}),
    Family("ministral", "MinistralConfig", {"sliding_window": 8}),
    Family("qwen2", "Qwen2Config"),
    Family("qwen3", "Qwen3Config"),
    Family("qwen2_moe", "Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2}),
    Family("mixtral", "MixtralConfig", MOE),
    Family("qwen3_moe", "Qwen3MoeConfig", {**MOE, "mlp_only_layers": [1]}),
    Family("deepseek_v3", "DeepseekV3Config", {
        "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "num_key_value_heads": 4,
    }, drop=("head_dim",)),
    Family("smollm3", "SmolLM3Config", {"no_rope_layer_interval": 2}),
    Family("phi3", "Phi3Config"),
    Family("phi3-bf16", "Phi3Config", dtype=torch.bfloat16),
    Family("gpt_oss", "GptOssConfig", {**MOE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    Family("gpt_oss-bf16", "GptOssConfig", {**MOE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, dtype=torch.bfloat16),
    Family("gemma", "GemmaConfig"),
    Family("gemma2", "Gemma2Config", {"sliding_window": 8}),
    Family("gemma3_text", "Gemma3TextConfig", {"sliding_window": 8}),
    Family("gemma3_text-bf16", "Gemma3TextConfig", {"sliding_window": 8}, dtype=torch.bfloat16),
    Family("gemma4_text", "Gemma4TextConfig", {"sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    Family("gemma3n_text", "Gemma3nTextConfig", {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "altup_num_inputs": 3, "laurel_rank": 4,
        "num_kv_shared_layers": 0, "sliding_window": 8, "activation_sparsity_pattern": [0.0, 0.0, 0.0], "intermediate_size": [48] * 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }, "dddd", "---"),
    Family("qwen3_next", "Qwen3NextConfig", {**MOE, **LINEAR, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    Family("qwen3_5_text", "Qwen3_5TextConfig", {**LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    Family("jamba", "JambaConfig", {**MOE, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False}),
    Family("bamba", "BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    Family("falcon_h1", "FalconH1Config", {**MAMBA, "mamba_d_ssm": 64}),
    Family("granite", "GraniteConfig", {"residual_multiplier": 0.5}),
    Family("granitemoe", "GraniteMoeConfig", {**MOE, "residual_multiplier": 0.5}),
    Family("granitemoehybrid", "GraniteMoeHybridConfig", {**MOE, **MAMBA, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention", "mamba"]}),
    Family("glm", "GlmConfig"),
    Family("glm4", "Glm4Config"),
    Family("llama4_text", "Llama4TextConfig", {**MOE, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 16}),
    Family("olmo", "OlmoConfig"),
    Family("olmo2", "Olmo2Config", {}, "dddF"),
    Family("olmo3", "Olmo3Config", {"sliding_window": 8}, "dddF"),
    Family("olmoe", "OlmoeConfig", MOE),
    Family("olmo_hybrid", "OlmoHybridConfig", {**LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}, "FdFF"),
    Family("exaone4", "Exaone4Config", {"sliding_window": 8, "sliding_window_pattern": 2}, "dddF"),
    Family("cohere", "CohereConfig", mid=PARALLEL),
    Family("cohere2", "Cohere2Config", {"sliding_window": 8}, mid=PARALLEL),
    Family("phi", "PhiConfig", mid=PARALLEL),
    Family("persimmon", "PersimmonConfig"),
    Family("gpt2", "GPT2Config", GPT2),
    Family("gpt_bigcode", "GPTBigCodeConfig", GPT2),
    Family("gpt_neo", "GPTNeoConfig", {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]}),
    Family("gptj", "GPTJConfig", {**GPT2, "rotary_dim": 4}, mid=PARALLEL),
    Family("gpt_neox", "GPTNeoXConfig", mid=PARALLEL),
    Family("gpt_neox-sequential", "GPTNeoXConfig", {"use_parallel_residual": False}),
    Family("opt", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    Family("opt-post-norm", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": False}, "dddd"),
    Family("falcon", "FalconConfig", {"alibi": False, "parallel_attn": True, "multi_query": True}, mid=PARALLEL),
    Family("falcon-new", "FalconConfig", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}, mid=PARALLEL),
    Family("falcon-sequential", "FalconConfig", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    Family("bloom", "BloomConfig", {"n_layer": 3, "n_head": 4}),
    Family("mpt", "MptConfig", {"d_model": WIDTH, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    Family("starcoder2", "Starcoder2Config", {"sliding_window": 8}),
    Family("stablelm", "StableLmConfig"),
    Family("stablelm-parallel", "StableLmConfig", {"use_parallel_residual": True}, mid=PARALLEL),
    Family("nemotron", "NemotronConfig"),
    Family("nemotron_h", "NemotronHConfig", {**MAMBA, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 4, "hybrid_override_pattern": "M*-", "layers_block_type": ["mamba", "attention", "mlp"]}),
    Family("mamba", "MambaConfig", {"state_size": 8, "time_step_rank": 4}),
    Family("mamba-bf16", "MambaConfig", {"state_size": 8, "time_step_rank": 4}, "Fddd", dtype=torch.bfloat16),
    Family("mamba2", "Mamba2Config", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}),
    Family("lfm2", "Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    Family("zamba2", "Zamba2Config", {**MAMBA}),
    Family("recurrent_gemma", "RecurrentGemmaConfig", {"lru_width": WIDTH, "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"]}),
    Family("arcee", "ArceeConfig"),
    Family("helium", "HeliumConfig"),
    Family("ernie4_5", "Ernie4_5Config"),
    Family("hunyuan_dense", "HunYuanDenseV1Config"),
    Family("seed_oss", "SeedOssConfig"),
    Family("apertus", "ApertusConfig"),
    Family("diffllama", "DiffLlamaConfig"),
    Family("bitnet", "BitNetConfig"),
    Family("xglm", "XGLMConfig", {"d_model": WIDTH, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4}),
    Family("biogpt", "BioGptConfig"),
    Family("deepseek_v4", "DeepseekV4Config", {}),
    Family("minimax", "MiniMaxConfig", MOE),
    Family("doge", "DogeConfig"),
    Family("dbrx", "DbrxConfig", {"d_model": WIDTH, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
]  # fmt: skip
