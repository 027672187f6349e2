"""Writes the compressed latents of MLA (DeepSeek-V2, section 2.1) to their cache slots in FP8, with a scale each."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.kv_cache.spec import latent_fp8
from deepserve.ops.op import Case, Cost, Told, nbytes, normal, op
from deepserve.ops.quant_fp8.spec import FP8, quant_fp8


def latent_parts(
    entries: torch.Tensor, rank: int, rope_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of entries uint8 [n, entry bytes]: values uint8 [n, R] (bytes of e4m3), rope channels [n, P] of `dtype`,
    scales fp32 [n]; kv_cache/spec.py:LatentFp8 says where they lie."""
    at = latent_fp8(rank, rope_dim * dtype.itemsize)
    rope = entries[:, at.rope : at.scale].view(dtype)
    return entries[:, :rank], rope, entries[:, at.scale : at.scale + 4].view(torch.float32).squeeze(1)


def read_latents(
    entries: torch.Tensor, rank: int, rope_dim: int, dtype: torch.dtype, fp8: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp32 [n, R], `dtype` [n, P]): the latents of these entries, dequantised, and their rope channels."""
    values, rope, scales = latent_parts(entries, rank, rope_dim, dtype)
    return values.view(fp8).float() * scales.unsqueeze(1), rope


def fp8_cache(num_blocks: int, block_size: int, rank: int, rope_bytes: int, device: str) -> torch.Tensor:
    """A cache whose entries are all NaN: in e4m3fn 0xFF is one, and a scale of such bytes is in any format."""
    shape = (num_blocks, block_size, latent_fp8(rank, rope_bytes).size)
    return torch.full(shape, 0xFF, dtype=torch.uint8, device=device)


def _case(num_tokens: int, rank: int, rope_dim: int, fp8: torch.dtype, bench: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        num_blocks = 2 + num_tokens // 16
        gains = torch.rand(num_tokens, 1, generator=generator) * 30  # a scale each
        gains[1:2] = 0
        return (
            (normal(generator, (num_tokens, rank), torch.float32, "cpu") * gains).to(dtype).to(device),
            normal(generator, (num_tokens, rope_dim), dtype, device),
            fp8_cache(num_blocks, 16, rank, rope_dim * dtype.itemsize, device),
            torch.randperm(num_blocks * 16, generator=generator)[:num_tokens].to(device),
            fp8,
        )

    return Case(f"T{num_tokens}-R{rank}-P{rope_dim}-{fp8}".replace("torch.", ""), make, bench, fp8)


def _numbers(
    latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, fp8: torch.dtype
) -> Told:
    """Of all entries: the latents, which may be an FP8 step apart, and the rope channels."""
    latents, rope = read_latents(cache.flatten(0, 1), latent.shape[1], k_rope.shape[1], k_rope.dtype, fp8)
    return (latents, fp8), (rope, k_rope.dtype)


def _cost(latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, *rest: Any) -> Cost:
    written = len(latent) * (latent.shape[1] + 4) + nbytes(k_rope)
    return Cost(nbytes(latent, k_rope, rest[0]) + written, 3 * latent.numel())


@op(
    writes=("cache",),
    numbers=_numbers,
    cases=(
        _case(1, 512, 64, FP8[0]),
        _case(7, 96, 24, FP8[0]),
        _case(5, 512, 64, FP8[1]),
        _case(1030, 512, 16, FP8[0]),
        _case(4096, 512, 64, FP8[0], bench=True),
        _case(4096, 512, 64, FP8[1], bench=True),
        _case(32768, 512, 64, FP8[0], bench=True),
    ),
    cost=_cost,
)
def write_latent_fp8(
    latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, fp8: torch.dtype
) -> torch.Tensor:
    """latent [T, R], k_rope [T, P] (rotated) of one dtype, rows of both may be strided, cache uint8 [num_blocks,
    block_size, entry bytes] contiguous, slot_mapping [T] int64 (block * block_size + offset, all different) -> cache,
    with entry slot_mapping[t] set to token t.

    An entry, with S bytes a rope channel (R a multiple of 16): bytes 0 to R hold the latent in `fp8` (float8_e4m3fn, or
    float8_e4m3fnuz on gfx942), R to R + S P the rope channels as they are (they carry the position), the next 4 one
    fp32 scale, and padding, which nobody reads and which may be written, makes it a multiple of 16 bytes: 512 + 128 + 4
    + 12 = 656 for V3 in bf16.

    The scale is that of quant_fp8 over all R channels: the largest magnitude (at least 1e-4) over the largest value of
    `fp8`, rounded up to a power of two. So value * scale is exact (in fp16 down to its least number), and a kernel that
    folds the scale into scores and probabilities computes from the same numbers as one that multiplies latents with it.
    An e4m3 step is as wide beside either scale: of 512 normal channels the rounding is 2.65 % (rms) instead of 2.63 %.
    """
    values, rope, scales = latent_parts(cache.flatten(0, 1), latent.shape[1], k_rope.shape[1], k_rope.dtype)
    x8, scale = quant_fp8(latent, latent.shape[1], True, fp8)
    values[slot_mapping], rope[slot_mapping], scales[slot_mapping] = x8.view(torch.uint8), k_rope, scale.squeeze(1)
    return cache
