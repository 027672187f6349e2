"""Makes the benchmark checkpoints: config.json, random bf16 safetensors and a tokenizer, the same for every engine.

    python benchmarks/checkpoints.py DIRECTORY [NAME ...]

Weights have unit gain (std fan_in^-0.5, norms 1, embeddings 1 unless they are the head too), so that MoE routing
spreads over the experts as it does in a trained model; constant or tiny weights collapse it and flatter every result.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLAMA_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

# 103 M parameters, of which 54 M work on a token: DeepSeek-V3 in every part, small in every number.
DEEPSEEK_V3_TOY = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 384,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 16384,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

CONFIGS = {"llama-135m": LLAMA_135M, "deepseek-v3-toy": DEEPSEEK_V3_TOY}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a checkpoint, as the released ones have them."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    attention = _mla(config) if "kv_lora_rank" in config else _grouped_query(config)
    for layer in range(config["num_hidden_layers"]):
        parts = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        parts |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        if layer < config.get("first_k_dense_replace", layer + 1):
            parts |= _mlp("mlp.", hidden, config["intermediate_size"])
        else:
            parts |= _moe(config)
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
        if "mlp.gate" in parts:
            found[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
    return found


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    sides = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {prefix + name: shape for name, shape in sides.items()}


def _moe(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    parts = {"mlp.gate": (config["n_routed_experts"], hidden)}
    parts |= _mlp("mlp.shared_experts.", hidden, inner * config["n_shared_experts"])
    for expert in range(config["n_routed_experts"]):
        parts |= _mlp(f"mlp.experts.{expert}.", hidden, inner)
    return parts


def _grouped_query(config: dict) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}


def _mla(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, heads, q_rank = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "q_a_proj": (q_rank, hidden),
        "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (nope + rope), q_rank),
        "kv_a_proj_with_mqa": (config["kv_lora_rank"] + rope, hidden),
        "kv_a_layernorm": (config["kv_lora_rank"],),
        "kv_b_proj": (heads * (nope + v), config["kv_lora_rank"]),
        "o_proj": (hidden, heads * v),
    }


def make_checkpoint(directory: Path, name: str, seed: int = 0) -> Path:
    """Write the checkpoint `name` under `directory` unless it is there already; its path."""
    path, config = directory / name, CONFIGS[name]
    if (path / "config.json").exists() and json.loads((path / "config.json").read_text()) == config:
        return path
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor, shape in shapes(config).items():
        if tensor.endswith("norm.weight"):
            tensors[tensor] = torch.ones(shape, dtype=torch.bfloat16)
        elif tensor.endswith("e_score_correction_bias"):
            tensors[tensor] = torch.randn(shape, generator=generator) * 0.01
        else:
            embedding = "embed_tokens" in tensor and not config["tie_word_embeddings"]
            std = 1.0 if embedding else shape[-1] ** -0.5
            tensors[tensor] = (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    _tokenizer(config["vocab_size"]).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (path / "config.json").write_text(json.dumps(config, indent=2))  # last: it marks the checkpoint as whole
    return path


def _tokenizer(vocab_size: int) -> Tokenizer:
    """One word a token, `w0` to `wN`: engines want a tokenizer, prompts are sent as token ids."""
    words = {f"w{index}": index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def num_parameters(config: dict) -> tuple[int, int]:
    """All parameters, and those that work on a token (of the experts only the chosen ones)."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes(config).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (1 - config["num_experts_per_tok"] / config["n_routed_experts"]) if experts else 0
    return sum(sizes.values()), sum(sizes.values()) - int(idle)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or CONFIGS:
        made = make_checkpoint(Path(sys.argv[1]), wanted)
        total, active = num_parameters(CONFIGS[wanted])
        print(f"{made}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active")
