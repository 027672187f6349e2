"""Writes a Hugging Face checkpoint (Llama or DeepSeek-V3) as a BF16 GGUF file without a vocabulary, for llama.cpp."""

import json
import struct
from pathlib import Path

import numpy as np
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType

_LLAMA = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_DEEPSEEK = {
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "o_proj": "attn_output",
}
_SIDES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Convert `checkpoint` (config.json and *.safetensors in bf16 or fp32) to the GGUF file `path`."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors |= _read_safetensors(shard)
    architecture = "deepseek2" if "kv_lora_rank" in config else "llama"
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(partial, architecture)
    _describe(writer, config)
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, target in top.items():
        if f"{name}.weight" in tensors:
            _add(writer, f"{target}.weight", tensors[f"{name}.weight"])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        parts = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for name, value in _layer(parts, config).items():
            _add(writer, f"blk.{layer}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _describe(writer: GGUFWriter, config: dict) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    _describe_rope_scaling(writer, config.get("rope_scaling") or {})
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "kv_lora_rank" not in config:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        return
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(rotary)
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rotary)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotary)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if config["n_group"] > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def _describe_rope_scaling(writer: GGUFWriter, scaling: dict) -> None:
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    if kind == "default":
        return
    if kind != "yarn":
        raise SystemExit(f"rope scaling {kind} is not converted")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _layer(parts: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """One layer's tensors under GGUF names."""
    found = {
        "attn_norm.weight": parts["input_layernorm.weight"],
        "ffn_norm.weight": parts["post_attention_layernorm.weight"],
    }
    mla = "kv_lora_rank" in config
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, target in (_DEEPSEEK if mla else _LLAMA).items():
        weight = parts.get(f"self_attn.{name}.weight")
        if weight is not None:
            found[f"{target}.weight"] = weight if mla or name not in heads else _interleaved(weight, heads[name])
    if mla:
        if "self_attn.q_proj.weight" in parts:
            found["attn_q.weight"] = parts["self_attn.q_proj.weight"]
        both = parts["self_attn.kv_b_proj.weight"].reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
        nope = config["qk_nope_head_dim"]
        found["attn_k_b.weight"] = np.ascontiguousarray(both[:, :nope].transpose(0, 2, 1))
        found["attn_v_b.weight"] = np.ascontiguousarray(both[:, nope:])
    if "mlp.gate.weight" not in parts:
        return found | {f"{target}.weight": parts[f"mlp.{name}.weight"] for name, target in _SIDES.items()}
    found["ffn_gate_inp.weight"] = _float32(parts["mlp.gate.weight"])
    found["exp_probs_b.bias"] = parts["mlp.gate.e_score_correction_bias"]
    for name, target in _SIDES.items():
        experts = [parts[f"mlp.experts.{index}.{name}.weight"] for index in range(config["n_routed_experts"])]
        found[f"{target}_exps.weight"] = np.stack(experts)
        found[f"{target}_shexp.weight"] = parts[f"mlp.shared_experts.{name}.weight"]
    return found


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Llama's rotary halves as neighbouring pairs, which is what llama.cpp rotates."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _float32(values: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) as fp32; fp32 as it is."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


def _add(writer: GGUFWriter, name: str, values: np.ndarray) -> None:
    if values.ndim == 1 or values.dtype == np.float32:
        writer.add_tensor(name, _float32(values))
    else:
        raw = np.ascontiguousarray(values).view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name; bf16 as its bits in uint16, which NumPy has no type for."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    types = {"BF16": np.uint16, "F32": np.float32}
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return found
