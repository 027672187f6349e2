"""What a model caches, layer by layer: kinds, bytes per token, and what a block must be a multiple of. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from deepserve.architecture import Architecture, Mla

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache of one layer. `kind`: mla_latent (kv_rank + rope_dim values a token) or kv_heads (a K and a V row).

    `row` is the shape of one token's entry, `dtype` its stored type.
    """

    kind: str
    layer: int
    row: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this cache."""
        size = DTYPE_BYTES[self.dtype]
        for length in self.row:
            size *= length
        return size


def cache_specs(architecture: Architecture, dtype: str) -> list[CacheSpec]:
    """The caches of every layer in order (architectures.md section 8: 1,152 bytes a token and layer for V3 in bf16)."""
    attention = architecture.attention
    row: tuple[int, ...]
    if isinstance(attention, Mla):
        kind, row = "mla_latent", (attention.kv_rank + attention.rope_dim,)
    else:
        kind, row = "kv_heads", (2, attention.num_kv_heads, attention.head_dim)
    return [CacheSpec(kind, layer, row, dtype) for layer in range(architecture.num_layers)]


def bytes_per_token(specs: list[CacheSpec]) -> int:
    """Cache bytes of one token over all layers."""
    return sum(spec.bytes_per_token for spec in specs)
