"""rms_norm_rope_write_latent in Triton: a warp takes whole tokens, from the projection's to the cache's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

TOKENS = 2  # of a program, however many there are: what one of them adds up in which order hangs on it


@triton.jit
def rotate_keys(
    source, target, angles, is_token, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, HALF_BLOCK: tl.constexpr
):
    """DIM channels at source [TOKENS, 1], rotated by the angles at `angles` [TOKENS, 1], to target [TOKENS, 1]."""
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    mask = is_token & (pair < DIM // 2)
    cos = tl.load(angles + pair, mask, 0.0)
    sin = tl.load(angles + DIM // 2 + pair, mask, 0.0)
    if INTERLEAVED:  # whole rows are loaded, so that accesses stay wide; pairs part and meet in registers
        channel = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        mask = is_token & (channel < DIM)
        row = tl.load(source + channel, mask, 0.0)
        first, second = tl.split(tl.reshape(row.to(tl.float32), (row.shape[0], HALF_BLOCK, 2)))
        rotated = tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), row.shape)
        tl.store(target + channel, rotated.to(row.dtype).to(target.dtype.element_ty), mask)
    else:
        left = tl.load(source + pair, mask, 0.0)
        first, second = left.to(tl.float32), tl.load(source + DIM // 2 + pair, mask, 0.0).to(tl.float32)
        rotated = (first * cos - second * sin).to(left.dtype)
        tl.store(target + pair, rotated.to(target.dtype.element_ty), mask)
        rotated = (second * cos + first * sin).to(left.dtype)
        tl.store(target + DIM // 2 + pair, rotated.to(target.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_rope_write_latent_kernel(
    latent,  # [T, RANK] at row stride latent_stride
    weight,
    eps,
    k_rope,  # [T, 1, DIM] at row stride rope_stride
    positions,
    cos_sin,  # [max_pos, DIM]
    cache,  # [slots, RANK + DIM]
    slot_mapping,
    num_tokens,
    latent_stride,
    rope_stride,
    INTERLEAVED: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # power of two that covers DIM / 2
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    is_token = token < num_tokens
    channel = tl.arange(0, RANK_BLOCK)[None, :]
    mask = is_token & (channel < RANK)
    wide = tl.load(latent + token * latent_stride + channel, mask, 0.0).to(tl.float32)  # before anything is stored
    gain = tl.load(weight + channel, channel < RANK, 0.0).to(tl.float32)
    entry = cache + tl.load(slot_mapping + token, is_token, 0) * (RANK + DIM)
    angles = cos_sin + tl.load(positions + token, is_token, 0) * DIM
    rotate_keys(k_rope + token * rope_stride, entry + RANK, angles, is_token, INTERLEAVED, DIM, HALF_BLOCK)
    scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / RANK + eps)
    normed = (wide * scale).to(latent.dtype.element_ty).to(tl.float32) * gain  # rounded, then weighted: two roundings
    tl.store(entry + channel, normed.to(latent.dtype.element_ty).to(cache.dtype.element_ty), mask)


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
    _rms_norm_rope_write_latent_kernel[(triton.cdiv(num_tokens, TOKENS),)](
        latent, weight, eps, k_rope, positions, cos_sin, cache, slot_mapping, num_tokens, latent.stride(0),
        k_rope.stride(0), interleaved, rank, dim, TOKENS, block, next_power_of_two(dim // 2),
        num_warps=num_warps(block), **overlap(latent.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("rms_norm_rope_write_latent", "triton", rms_norm_rope_write_latent)
