"""The demo model for training: DeepSeek-V3 in plain PyTorch with one MTP layer, and its checkpoint on disk.

Every expert computes every token and the router's weights zero the rest: at this size one dense product costs less than
sorting tokens, needs no capacity, and compiles without a graph break. The result is that of the sparse model.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that shape the model."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 768
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 8
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024  # positions seen in training: the model is lost beyond them
    yarn_original: int = 1024
    yarn_factor: float = 4.0

    def checkpoint_config(self) -> dict:
        """config.json of a DeepseekV3ForCausalLM."""
        fields = asdict(self)
        original, factor = fields.pop("yarn_original"), fields.pop("yarn_factor")
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **fields,
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "moe_layer_freq": 1,
            "ep_size": 1,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "rope_scaling": {
                "type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        }


def yarn_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotary pair, float64 [P/2]."""
    dim, base, length = config.qk_rope_head_dim, config.rope_theta, config.yarn_original

    def turning(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(turning(32)), 0), min(math.ceil(turning(1)), dim - 1)
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / config.yarn_factor * ramp + plain * (1 - ramp)


class RMSNorm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size], same dtype out; statistics in float32."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE of x [B, S, N, P] by cos, sin [S, P/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """MLA, not absorbed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        width = c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.num_attention_heads * width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = nn.Linear(
            c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, bias=False)
        self.scale = width**-0.5 * (0.1 * math.log(c.yarn_factor) + 1) ** 2

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H], causal."""
        c, heads = self.config, self.config.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = rotate(k_rope[:, :, None], cos, sin).expand(-1, -1, heads, -1)
        query = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1).transpose(1, 2)
        key = torch.cat([k_nope, k_rope], -1).transpose(1, 2)
        # Values padded to the key width, which the flash kernel wants equal.
        value = F.pad(v, (0, query.shape[-1] - c.v_head_dim)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return self.o_proj(mixed[..., : c.v_head_dim].transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    """Sigmoid router with a correction bias and groups, routed experts as stacked weights, one shared expert."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        experts, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.gate = nn.Parameter(torch.empty(experts, hidden))
        self.gate_up = nn.Parameter(torch.empty(experts, 2, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.shared_experts = Mlp(hidden, width * c.n_shared_experts)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)

    def route(self, x: Tensor) -> Tensor:
        """Weights [T, E] float32 of x [T, H]: zero where not chosen; sums to the scaling factor."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(x.float() @ self.gate.float().T)
        with torch.no_grad():
            choice = scores + self.bias
            grouped = choice.unflatten(-1, (c.n_group, -1))
            kept = grouped.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
            outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, False)
            choice = grouped.masked_fill(outside[..., None], float("-inf")).flatten(-2)
            chosen = torch.zeros_like(choice).scatter(-1, choice.topk(c.num_experts_per_tok, -1).indices, 1.0)
            if self.training:
                self.load += chosen.sum(0)
        weights = scores * chosen
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        flat, experts = x.flatten(0, 1), self.config.n_routed_experts
        weights = self.route(flat)
        gate, up = F.linear(flat, self.gate_up.flatten(0, 2)).unflatten(-1, (experts, 2, -1)).unbind(-2)
        hidden = F.silu(gate) * up * weights[..., None].to(gate.dtype)
        routed = hidden.flatten(-2) @ self.down.permute(0, 2, 1).flatten(0, 1).to(hidden.dtype)
        return (routed + self.shared_experts(flat)).unflatten(0, x.shape[:2])


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Moe(c) if index >= c.first_k_dense_replace else Mlp(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class DemoModel(nn.Module):
    """The whole model; forward gives the final hidden states, `mtp` those of the MTP layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.enorm, self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps), RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.mtp_layer = Layer(c, c.num_hidden_layers)
        self.shared_head_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight", ".down"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * c.num_hidden_layers) if deep else 1))

    def angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [S, P/2], float32."""
        angle = torch.arange(length, dtype=torch.float64)[:, None] * yarn_frequencies(self.config)
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Final normed hidden states [B, S, H] of ids [B, S]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def mtp(self, hidden: Tensor, following: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed hidden states [B, S, H] that predict the token after `following` [B, S], given hidden [B, S, H]."""
        u = self.eh_proj(torch.cat([self.enorm(self.embed_tokens(following)), self.hnorm(hidden)], -1))
        return self.shared_head_norm(self.mtp_layer(u, cos, sin))


def checkpoint_tensors(model: DemoModel) -> dict[str, Tensor]:
    """The model's tensors under their Hugging Face names: bf16, the correction bias float32."""
    tensors: dict[str, Tensor] = {}
    last = model.config.num_hidden_layers
    mtp = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head_norm": "shared_head.norm"}
    for name, value in model.state_dict().items():
        head, _, rest = name.partition(".")
        if head == "lm_head":
            full = name
        elif head == "mtp_layer":
            full = f"model.layers.{last}.{rest}"
        elif head in mtp:
            full = f"model.layers.{last}.{mtp[head]}.{rest}"
        else:
            full = f"model.{name}"
        prefix = full.rsplit(".", 1)[0]
        if full.endswith(".mlp.bias"):
            tensors[f"{prefix}.gate.e_score_correction_bias"] = value.float().cpu()
        elif full.endswith(".mlp.gate"):
            tensors[f"{prefix}.gate.weight"] = value.bfloat16().cpu()
        elif full.endswith(".mlp.gate_up"):
            for e, (gate, up) in enumerate(value.bfloat16().cpu().unbind(0)):
                tensors[f"{prefix}.experts.{e}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{prefix}.experts.{e}.up_proj.weight"] = up.contiguous()
        elif full.endswith(".mlp.down"):
            for e, down in enumerate(value.bfloat16().cpu().unbind(0)):
                tensors[f"{prefix}.experts.{e}.down_proj.weight"] = down.contiguous()
        else:
            tensors[full] = value.bfloat16().cpu()
    return tensors


def save_checkpoint(model: DemoModel, folder: Path, shard_bytes: int = 15_000_000) -> None:
    """config.json and model-*.safetensors with their index, in shards of at most shard_bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.checkpoint_config(), indent=2) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in checkpoint_tensors(model).items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + value.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for shard in shards for t in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=0) + "\n"
    )


def load_checkpoint(folder: Path) -> DemoModel:
    """The training model in float32 from a checkpoint written by `save_checkpoint`."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(str(file)))
    known = json.loads((folder / "config.json").read_text())
    scaling = known["rope_scaling"]
    fields = {name: known[name] for name in ModelConfig.__dataclass_fields__ if name in known}
    model = DemoModel(
        ModelConfig(**fields, yarn_original=scaling["original_max_position_embeddings"], yarn_factor=scaling["factor"])
    )
    experts = range(model.config.n_routed_experts)
    state = {}
    for name in model.state_dict():
        head, _, rest = name.partition(".")
        last = f"model.layers.{model.config.num_hidden_layers}"
        full = {
            "lm_head": name,
            "mtp_layer": f"{last}.{rest}",
            "shared_head_norm": f"{last}.shared_head.norm.{rest}",
            **{x: f"{last}.{x}.{rest}" for x in ("enorm", "hnorm", "eh_proj")},
        }.get(head, f"model.{name}")
        prefix = full.rsplit(".", 1)[0]
        get = lambda part, at=prefix: torch.stack([tensors[f"{at}.experts.{e}.{part}.weight"] for e in experts])  # noqa: E731
        if full.endswith(".mlp.bias"):
            state[name] = tensors[f"{prefix}.gate.e_score_correction_bias"]
        elif full.endswith(".mlp.gate"):
            state[name] = tensors[f"{prefix}.gate.weight"]
        elif full.endswith(".mlp.gate_up"):
            state[name] = torch.stack([get("gate_proj"), get("up_proj")], 1)
        elif full.endswith(".mlp.down"):
            state[name] = get("down_proj")
        else:
            state[name] = tensors[full]
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model
