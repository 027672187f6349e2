"""What a model caches, layer by layer: kinds, bytes, and what a block must be a multiple of. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from deepserve.architecture import Architecture, Gqa, Mla
from deepserve.sparse_attention import CompressedMqa

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "bytes": 1}
FP8_SCALE_BYTES = 4  # of an index key or a latent in FP8
FP8_ALIGNMENT = 16  # bytes that one thread of a kernel loads at once: entries of latents begin at multiples of it
# What a GPU's attention makes of a cache's entries, at a time: keys and values of latents, and fp32 results of parts
# of contexts where they do not depend on the batch.
EXPANDED_BYTES, FIXED_BYTES = 512 << 20, 256 << 20
LARGEST_RANK = 512  # channels of a latent that a GPU's program multiplies in one go


@dataclass(frozen=True, slots=True)
class LatentFp8:
    """A latent's entry in FP8: the bytes at which its parts begin. At 0 lie the latent's channels, a byte of e4m3 each;
    at `rope` its rope channels in the dtype that is computed in; at `scale` one fp32; the rest of `size` is padding."""

    rope: int
    scale: int
    size: int


def latent_fp8(rank: int, rope_bytes: int) -> LatentFp8:
    """The entry of `rank` channels (a multiple of 16) and rope channels of `rope_bytes`: 656 bytes for 512 and 128."""
    scale = rank + rope_bytes
    return LatentFp8(rank, scale, -(-(scale + FP8_SCALE_BYTES) // FP8_ALIGNMENT) * FP8_ALIGNMENT)


def no_fp8(attention: Mla | Gqa | CompressedMqa) -> str | None:
    """Why what this attention caches cannot be in FP8; None where it can (index keys have a row of their own)."""
    if isinstance(attention, Gqa):
        return "no attention kernel of K/V heads reads it"
    if isinstance(attention, CompressedMqa):
        return "no attention kernel over windows and compressed entries reads it"
    if attention.indexer is not None:
        return "no attention kernel over chosen tokens reads it"
    if attention.kv_rank % FP8_ALIGNMENT:
        return f"rope channels behind kv_lora_rank {attention.kv_rank} would not be aligned: a multiple of 16 would be"
    return None


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache of one layer; `row` is the shape of an entry, `dtype` its stored type.

    Paged (ring 0): an entry every `ratio` tokens, in the blocks of the request. Kinds: mla_latent (kv_rank + rope_dim
    values; FP8 ones as bytes, see LatentFp8), kv_heads (a K and a V row a head), index_keys (FP8 ones as bytes),
    compressed. Entry j stands for tokens j * ratio on.
    A ring: an entry a token, position p in row p % ring of the request's ring. Kinds: window (K = V rows),
    compressor_state and index_compressor_state ([2, values]: a and g of every token, fp32).
    """

    kind: str
    layer: int
    row: tuple[int, ...]
    dtype: str
    ratio: int = 1
    ring: int = 0

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.row)

    @property
    def ring_bytes(self) -> int:
        """Bytes of one request's ring; 0 where the cache is paged."""
        return self.entry_bytes * self.ring

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block; 0 where the cache is a ring."""
        return 0 if self.ring else self.entry_bytes * (block_size // self.ratio)


def cache_specs(
    architecture: Architecture, dtype: str, num_speculative_tokens: int = 0, with_mtp: bool = False
) -> list[CacheSpec]:
    """The caches of every layer in order, for what is computed in `dtype` (V3 in bf16: 1,152 bytes a token and layer).

    Rings have a row more for each of `num_speculative_tokens`, so that rejected tokens overwrite nothing that is still
    visible. `with_mtp` adds the MTP layer, whose index is num_layers.
    """
    specs: list[CacheSpec] = []
    for layer in range(architecture.num_layers + with_mtp):
        attention = architecture.attention
        if isinstance(attention, Mla):
            specs.append(_latents(attention, layer, dtype))
            if attention.indexer is not None:
                dim, fp8 = attention.indexer.head_dim, attention.indexer.fp8_keys
                row = (dim + FP8_SCALE_BYTES,) if fp8 else (dim,)
                specs.append(CacheSpec("index_keys", layer, row, "bytes" if fp8 else dtype))
        elif isinstance(attention, CompressedMqa):
            specs += _compressed_mqa(attention, layer, dtype, num_speculative_tokens)
        else:
            specs.append(CacheSpec("kv_heads", layer, (2, attention.num_kv_heads, attention.head_dim), dtype))
    return specs


def _latents(mla: Mla, layer: int, dtype: str) -> CacheSpec:
    if mla.fp8_latents is None:
        return CacheSpec("mla_latent", layer, (mla.kv_rank + mla.rope_dim,), dtype)
    return CacheSpec("mla_latent", layer, (latent_fp8(mla.kv_rank, mla.rope_dim * DTYPE_BYTES[dtype]).size,), "bytes")


def _compressed_mqa(attention: CompressedMqa, layer: int, dtype: str, num_extra: int) -> Iterator[CacheSpec]:
    dim, compression = attention.head_dim, attention.compression(layer)
    yield CacheSpec("window", layer, (dim,), dtype, ring=attention.window + num_extra)
    if compression is None:
        return
    ratio, ring = compression.ratio, compression.span + num_extra
    yield CacheSpec("compressed", layer, (dim,), dtype, ratio)
    yield CacheSpec("compressor_state", layer, (2, compression.state_width(dim)), "fp32", ring=ring)
    if compression.sparse and attention.indexer is not None:
        dim = attention.indexer.head_dim
        yield CacheSpec("index_keys", layer, (dim,), dtype, ratio)
        yield CacheSpec("index_compressor_state", layer, (2, compression.state_width(dim)), "fp32", ring=ring)


def block_multiple(specs: list[CacheSpec]) -> int:
    """What a block's tokens must be a multiple of, so that it holds whole entries of every ratio."""
    return math.lcm(*(spec.ratio for spec in specs))


def bytes_per_token(specs: list[CacheSpec]) -> int:
    """Paged bytes of one token over all layers, rounded up where a token is a part of an entry."""
    tokens = block_multiple(specs)
    return -(-sum(spec.block_bytes(tokens) for spec in specs) // tokens)


def ring_bytes(specs: list[CacheSpec]) -> int:
    """Bytes of one request's rings over all layers, whatever its length."""
    return sum(spec.ring_bytes for spec in specs)
