"""Tiny random models of many decoder families, and where the residual stream can be edited in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

WIDTH = 32
LAYERS = 3
VOCABULARY = 96

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that greedy tokens differ
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """One family: its config class, what differs from :data:`BASE`, and what must be found in it.

    ``fused`` has one letter per site, ``resid_pre`` of every block and then ``resid_post`` of the last: ``F`` fused
    into a norm, ``d`` edited at the block's door. ``mid`` has one per block: ``F``, ``d`` (at its norm's door) or ``-``
    (no such site).
    """

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
    """The model in eval mode, the weights of its norms random; skips what this transformers does not have."""
    if not hasattr(transformers, family.config):
        pytest.skip(f"transformers {transformers.__version__} has no {family.config}")
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**_options(family))
    model = getattr(transformers, family.model)
    model = model.from_config(config) if family.model.startswith("Auto") else model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(family.dtype).eval()


def _options(family: Family) -> dict[str, Any]:
    # a composite config takes the base options for its language model
    base = {name: value for name, value in BASE.items() if name not in family.drop}
    if "text_config" in family.options:
        return {**family.options, "text_config": {**base, **family.options["text_config"]}}
    return {**base, **family.options}


WINDOW = {"sliding_window": 8}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**MOE, "shared_expert_intermediate_size": 16}
MAMBA = {
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip
TURNS = ["linear_attention", "full_attention", "linear_attention"]
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "layer_types": TURNS,
}  # fmt: skip
LATENT = {
    "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
GEMMA = {  # the last two blocks take keys and values from the first two
    **WINDOW, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
STREAMS = {
    **GEMMA, "altup_num_inputs": 3, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.5, 0.0, 0.0],
    "intermediate_size": [48] * 4,
}  # fmt: skip
HYPER = {
    **MOE, "n_routed_experts": 4, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2,
    "index_head_dim": 8, "index_topk": 4, "sliding_window": 8, "num_key_value_heads": 1, "hc_mult": 2,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
GPT2 = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
ALIBI = {"alibi": True, "parallel_attn": False, "multi_query": False}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}
RECURRENT = {"lru_width": WIDTH, "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"]}
JAMBA = {
    **MOE, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False,
}  # fmt: skip
NEMOTRON = {
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 4,
    "layers_block_type": ["mamba", "attention", "mlp"],
}  # fmt: skip
GRANITE = {**MOE, **MAMBA, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention", "mamba"]}
LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
MAMBA2 = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}
NEO = {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]}
ZAMBA = {
    **MAMBA, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 4, "layers_block_type": ["mamba", "hybrid", "mamba"],
    "hybrid_layer_ids": [1], "use_mem_eff_path": False, "num_key_value_heads": 4,
}  # fmt: skip
DBRX: dict[str, Any] = {
    "d_model": WIDTH, "n_layers": 3, "n_heads": 4, "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip
if transformers.__version__ >= "5":
    DBRX["ffn_config"] = {**DBRX["ffn_config"], "hidden_size": WIDTH}
# as many vision blocks as language blocks: the number does not tell them apart
SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
LLAVA = {"text_config": {"model_type": "llama"}, "vision_config": {**SIGLIP, "model_type": "clip_vision_model"}}
GEMMA3 = {"text_config": MIXED, "vision_config": SIGLIP, "mm_tokens_per_image": 4}
HEAD = ("head_dim",)
RENAMED = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "max_position_embeddings",
    "num_hidden_layers",
)  # fmt: skip
HALF = torch.bfloat16

FAMILIES = [
    # pre-norm, sequential
    Family("llama", "LlamaConfig"),
    Family("llama-bf16", "LlamaConfig", dtype=HALF),
    Family("mistral", "MistralConfig", WINDOW),
    Family("qwen2", "Qwen2Config"),
    Family("qwen3", "Qwen3Config"),
    Family("smollm3", "SmolLM3Config", {"no_rope_layer_interval": 2}),
    Family("phi3", "Phi3Config"),
    Family("gemma", "GemmaConfig"),
    Family("gemma2", "Gemma2Config", WINDOW),
    Family("gemma3_text", "Gemma3TextConfig", WINDOW),
    Family("gemma3_text-bf16", "Gemma3TextConfig", WINDOW, dtype=HALF),
    Family("gemma4_text", "Gemma4TextConfig", {**GEMMA, "global_head_dim": 16}, "FFFFF", "FFFF"),
    Family("granite", "GraniteConfig", {"residual_multiplier": 0.5}),
    Family("glm", "GlmConfig"),
    Family("glm4", "Glm4Config"),
    Family("helium", "HeliumConfig"),
    Family("ernie4_5", "Ernie4_5Config"),
    Family("hunyuan_dense", "HunYuanDenseV1Config"),
    Family("seed_oss", "SeedOssConfig"),
    Family("apertus", "ApertusConfig"),
    Family("diffllama", "DiffLlamaConfig"),
    Family("bitnet", "BitNetConfig"),
    Family("doge", "DogeConfig"),
    # experts
    Family("mixtral", "MixtralConfig", MOE),
    Family("qwen2_moe", "Qwen2MoeConfig", {**SHARED, "decoder_sparse_step": 2}),
    Family("qwen3_moe", "Qwen3MoeConfig", {**MOE, "mlp_only_layers": [1]}),
    Family("granitemoe", "GraniteMoeConfig", {**MOE, "residual_multiplier": 0.5}),
    Family("olmoe", "OlmoeConfig", MOE),
    Family("deepseek_v3", "DeepseekV3Config", LATENT, drop=HEAD),
    Family("llama4_text", "Llama4TextConfig", {**MOE, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}),
    Family("gpt_oss", "GptOssConfig", {**MOE, **MIXED}),
    Family("gpt_oss-bf16", "GptOssConfig", {**MOE, **MIXED}, dtype=HALF),
    Family("dbrx", "DbrxConfig", DBRX, drop=RENAMED),
    # recurrent and hybrid
    Family("qwen3_next", "Qwen3NextConfig", {**SHARED, **LINEAR}),
    Family("qwen3_5_text", "Qwen3_5TextConfig", LINEAR),
    Family("minimax", "MiniMaxConfig", {**MOE, "layer_types": TURNS}, mid="---"),
    Family("jamba", "JambaConfig", JAMBA),
    Family("bamba", "BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    Family("falcon_h1", "FalconH1Config", {**MAMBA, "mamba_d_ssm": 64}),
    Family("granitemoehybrid", "GraniteMoeHybridConfig", GRANITE),
    Family("lfm2", "Lfm2Config", LFM2),
    Family("recurrent_gemma", "RecurrentGemmaConfig", RECURRENT),
    Family("zamba2", "Zamba2Config", ZAMBA, "FdFF", "---"),
    Family("nemotron_h", "NemotronHConfig", NEMOTRON, mid="---"),
    Family("mamba", "MambaConfig", {"state_size": 8, "time_step_rank": 4}, mid="---"),
    Family("mamba-bf16", "MambaConfig", {"state_size": 8, "time_step_rank": 4}, "Fddd", "---", HALF),
    Family("mamba2", "Mamba2Config", MAMBA2, mid="---"),
    # LayerNorm
    Family("gpt2", "GPT2Config", GPT2),
    Family("gpt_bigcode", "GPTBigCodeConfig", GPT2),
    Family("gpt_neo", "GPTNeoConfig", NEO),
    Family("gpt_neox-sequential", "GPTNeoXConfig", {"use_parallel_residual": False}),
    Family("opt", "OPTConfig", OPT),
    Family("falcon-sequential", "FalconConfig", ALIBI, drop=HEAD),
    Family("bloom", "BloomConfig", {"n_layer": 3, "n_head": 4}),
    Family("mpt", "MptConfig", {"d_model": WIDTH, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    Family("starcoder2", "Starcoder2Config", WINDOW),
    Family("stablelm", "StableLmConfig"),
    Family("nemotron", "NemotronConfig", {}, "dddd", "ddd"),
    Family("persimmon", "PersimmonConfig"),
    Family("xglm", "XGLMConfig", {"d_model": WIDTH, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4}),
    Family("biogpt", "BioGptConfig"),
    Family("olmo", "OlmoConfig"),
    Family("olmo-bf16", "OlmoConfig", dtype=HALF),
    # attention and MLP side by side
    Family("cohere", "CohereConfig", mid="---"),
    Family("cohere2", "Cohere2Config", WINDOW, mid="---"),
    Family("phi", "PhiConfig", mid="---"),
    Family("gptj", "GPTJConfig", {**GPT2, "rotary_dim": 4}, mid="---"),
    Family("gpt_neox", "GPTNeoXConfig", mid="---"),
    Family("falcon", "FalconConfig", {"alibi": False}, mid="---", drop=HEAD),
    Family("falcon-new", "FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}, mid="---", drop=HEAD),
    Family("stablelm-parallel", "StableLmConfig", {"use_parallel_residual": True}, mid="---"),
    # no norm reads the residual itself
    Family("olmo2", "Olmo2Config", {}, "dddF", "---"),
    Family("olmo3", "Olmo3Config", WINDOW, "dddF", "---"),
    Family("exaone4", "Exaone4Config", {**WINDOW, "sliding_window_pattern": 2}, "dddF", "---"),
    Family("olmo_hybrid", "OlmoHybridConfig", LINEAR, "FdFF", "F-F"),
    Family("opt-post-norm", "OPTConfig", {**OPT, "do_layer_norm_before": False}, "dddd", "---"),
    Family("gemma3n_text", "Gemma3nTextConfig", STREAMS, "ddddd", "----"),
    Family("deepseek_v4", "DeepseekV4Config", HYPER, "dddd", "---"),
    # the first block has no norm; the last norm is also the first
    Family("modernbert-decoder", "ModernBertDecoderConfig", {}, "dFFF"),
    Family("nanochat", "NanoChatConfig", {}, "FFFd"),
    # vision and language
    Family("llava", "LlavaConfig", LLAVA, model="LlavaForConditionalGeneration"),
    Family("gemma3", "Gemma3Config", GEMMA3, model="Gemma3ForConditionalGeneration"),
]  # fmt: skip

FOLDED = {
    **SHARED, **LINEAR, "hc_count": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 200, "split_ngram_parts": 1,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
SHORT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "n_layers_per_attn_res_block": 1,
    "unpadded_vocab_size": VOCABULARY,
}  # fmt: skip
REFUSED = [
    # streams folded into one wide row; blocks that attend to the states of earlier ones; four lists of half blocks
    (Family("qwen4_exp", "Qwen4ExpTextConfig", FOLDED), "the state has shape [2, 3, 64], not one row of width 32"),
    (Family("inkling2", "Inkling2TextConfig", SHORT), "resid_pre[0]: no such site"),
    (Family("xlm", "XLMConfig"), "XLMModel does not hand on to block 1 what block 0 returns"),
]
