"""A model as the plan, the caches and the layers need to know it: one spelling, nothing left implicit. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepserve.sparse_attention import CompressedMqa, Indexer


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of `dim` channels a head. `kind`: default, linear, yarn or llama3 (parameters below)."""

    dim: int
    theta: float
    interleaved: bool
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @property
    def cos_sin_scale(self) -> float:
        """Multiplier of cos and sin (YaRN): 1 for every released DeepSeek."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, section 2.1). `q_rank` is None where q is projected directly.

    With an `indexer` it is sparse (V3.2): each token sees the keys that the indexer chooses. `fp8_latents` is the
    format that its latents are cached in, None where that is the dtype that is computed in.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    bias: bool
    indexer: Indexer | None = None
    fp8_latents: str | None = None  # fp8_e4m3fn or fp8_e4m3fnuz

    @property
    def dense_length(self) -> int | None:
        """The longest context in which an indexer has nothing to leave out; None without one."""
        return self.indexer.top_k if self.indexer else None


@dataclass(frozen=True, slots=True)
class Gqa:
    """Grouped-query attention; `sliding_windows[layer]` is None where the layer sees everything."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture of experts. `scoring`: softmax, sigmoid or sqrtsoftplus; `selection`: greedy, group_max or group_top2.

    `has_bias`: a bias decides as well, but does not weigh. In `hash_layers` the token's id alone chooses. What SwiGLU
    multiplies is clamped to `swiglu_limit`, in shared experts too.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    layers: tuple[bool, ...]  # which decoder layers are MoE
    num_shared_experts: int = 0
    scoring: str = "softmax"
    selection: str = "greedy"
    num_groups: int = 1
    top_k_groups: int = 1
    routed_scaling_factor: float = 1.0
    has_bias: bool = False
    hash_layers: tuple[bool, ...] = ()
    swiglu_limit: float | None = None

    def is_hashed(self, layer: int) -> bool:
        """Whether the token's id chooses the experts of decoder layer `layer`."""
        return layer < len(self.hash_layers) and self.hash_layers[layer]


@dataclass(frozen=True, slots=True)
class HyperConnections:
    """A residual of `num_streams` streams, mixed before and after each sublayer (mHC)."""

    num_streams: int
    iterations: int  # Sinkhorn passes
    eps: float


@dataclass(frozen=True, slots=True)
class Quantization:
    """How linear weights are stored: `fp8_block` = e4m3 with one scale a `block` of (out, in).

    The scale of X.weight is the tensor X.`scale`.
    """

    kind: str
    block: tuple[int, int]
    power_of_two_scales: bool
    scale: str = "weight_scale_inv"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer, as far as the plan, the caches and the models need to know it."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    attention: Mla | Gqa | CompressedMqa
    rope: Rope
    moe: Moe | None
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    mlp_bias: bool
    num_mtp_layers: int
    dtype: str  # fp32, fp16 or bf16: what the checkpoint computes in
    quantization: Quantization | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    compress_rope: Rope | None = None  # of layers with compressed entries; `rope` is that of the others
    hyper_connections: HyperConnections | None = None

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts; the MTP layer (index num_layers) follows the last one."""
        return self.moe is not None and self.moe.layers[min(layer, self.num_layers - 1)]


def yarn_mscale(factor: float, mscale: float) -> float:
    """m(s, k) = 0.1 k ln(s) + 1 (YaRN, section 3.4); 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
