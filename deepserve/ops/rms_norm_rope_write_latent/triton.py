"""rms_norm_rope_write_latent in Triton: one program a token, from the projection's row to the cache's entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit
def _rms_norm_rope_write_latent_kernel(
    latent,  # [T, RANK] at row stride latent_stride
    weight,
    eps,
    k_rope,  # [T, 1, DIM] at row stride rope_stride
    positions,
    cos_sin,  # [max_pos, DIM]
    cache,  # [slots, RANK + DIM]
    slot_mapping,
    latent_stride,
    rope_stride,
    INTERLEAVED: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # power of two that covers DIM / 2
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    entry = cache + tl.load(slot_mapping + token) * (RANK + DIM)
    channel = tl.arange(0, RANK_BLOCK)
    wide = tl.load(latent + token * latent_stride + channel, channel < RANK, 0.0).to(tl.float32)
    gain = tl.load(weight + channel, channel < RANK, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
    normed = (wide * scale).to(latent.dtype.element_ty).to(tl.float32) * gain  # rounded, then weighted: two roundings
    normed = normed.to(latent.dtype.element_ty).to(cache.dtype.element_ty)
    tl.store(entry + channel, normed, channel < RANK)

    pair = tl.arange(0, HALF_BLOCK)
    mask = pair < DIM // 2
    angles = cos_sin + tl.load(positions + token) * DIM + pair
    cos = tl.load(angles, mask, 0.0)
    sin = tl.load(angles + DIM // 2, mask, 0.0)
    STEP: tl.constexpr = 2 if INTERLEAVED else 1  # 64 channels: too few for the order of loads to matter
    OTHER: tl.constexpr = 1 if INTERLEAVED else DIM // 2
    row = k_rope + token * rope_stride + pair * STEP
    first = tl.load(row, mask, 0.0).to(tl.float32)
    second = tl.load(row + OTHER, mask, 0.0).to(tl.float32)
    left = (first * cos - second * sin).to(k_rope.dtype.element_ty).to(cache.dtype.element_ty)
    right = (second * cos + first * sin).to(k_rope.dtype.element_ty).to(cache.dtype.element_ty)
    tl.store(entry + RANK + pair * STEP, left, mask)
    tl.store(entry + RANK + pair * STEP + OTHER, right, mask)


def rms_norm_rope_write_latent(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See spec.py. Rows of latent and k_rope may be strided."""
    num_tokens, rank = latent.shape
    dim, block = k_rope.shape[2], next_power_of_two(rank)
    _rms_norm_rope_write_latent_kernel[(num_tokens,)](
        latent, weight, eps, k_rope, positions, cos_sin, cache, slot_mapping, latent.stride(0), k_rope.stride(0),
        interleaved, rank, dim, block, next_power_of_two(dim // 2), num_warps=num_warps(block),
        **overlap(latent.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("rms_norm_rope_write_latent", "triton", rms_norm_rope_write_latent)
