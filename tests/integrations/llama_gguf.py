"""A transformers Llama as a GGUF model that llama.cpp loads: enough of the format to feed token ids, no vocabulary."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM

BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Names within a block, llama.cpp's and transformers'."""


def write_llama(model: LlamaForCausalLM, path: Path, kind: str = "F32") -> None:
    """Write ``model`` with its matrices as ``kind`` (a name of GGMLQuantizationType), its norms as F32."""
    config, decoder = model.config, model.model
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {"token_embd": decoder.embed_tokens.weight, "output_norm": decoder.norm.weight}
    tensors["output"] = model.lm_head.weight
    for number, block in enumerate(decoder.layers):
        for theirs, ours in BLOCK.items():
            weight = block.get_submodule(ours).weight
            tensors[f"blk.{number}.{theirs}"] = _interleave(weight, heads[theirs]) if theirs in heads else weight
    for name, tensor in tensors.items():
        data, dtype = tensor.detach().float().numpy(), gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def round_matrices(model: LlamaForCausalLM, kind: str) -> None:
    """Give ``model`` the values that its matrices have once they were written as ``kind``."""
    dtype = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                stored = gguf.quants.quantize(parameter.numpy(), dtype)
                parameter.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(stored, dtype), np.float32)))


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns neighbouring pairs of a head, transformers its two halves: rows ``(2, d/2)`` -> ``(d/2, 2)``."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
