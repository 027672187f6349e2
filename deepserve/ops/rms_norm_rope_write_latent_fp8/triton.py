"""rms_norm_rope_write_latent_fp8 in Triton: a warp takes a token, from the projection's row to its entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.mla_attention.entries import Entries
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.quant_fp8.spec import FLOOR
from deepserve.ops.rms_norm_rope_write_latent.triton import rotate_keys
from deepserve.ops.write_latent_fp8.triton import write_entries

TOKENS = 4  # of a program, a warp each


@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_rope_write_latent_fp8_kernel(
    latent,  # [T, RANK] at row stride latent_stride
    weight,
    eps,
    k_rope,  # [T, 1, DIM] at row stride rope_stride
    positions,
    cos_sin,  # [max_pos, DIM]
    latents,  # this, ropes and scales are the views of mla_attention/entries.py:Entries
    ropes,
    scales,
    slot_mapping,
    num_tokens,
    latent_stride,
    rope_stride,
    INTERLEAVED: tl.constexpr,
    LATENT_WIDTH: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    ROPE_AT: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    SCALE_AT: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
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
    every = channel + tl.zeros((TOKENS, 1), tl.int32)  # a gain for each token: one row's would lie in other lanes
    gain = tl.load(weight + every, mask, 0.0).to(tl.float32)
    slot = tl.load(slot_mapping + token, is_token, 0)
    angles = cos_sin + tl.load(positions + token, is_token, 0) * DIM
    keys = ropes + slot * ROPE_WIDTH + ROPE_AT
    rotate_keys(k_rope + token * rope_stride, keys, angles, is_token, INTERLEAVED, DIM, HALF_BLOCK)
    scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / RANK + eps)
    normed = (wide * scale).to(latent.dtype.element_ty).to(tl.float32) * gain  # rounded, then weighted: two roundings
    normed = normed.to(latent.dtype.element_ty).to(tl.float32)
    write_entries(
        normed, channel, slot, is_token, latents, scales, LATENT_WIDTH, SCALE_WIDTH, SCALE_AT, RANK, LARGEST, FLOOR
    )


def rms_norm_rope_write_latent_fp8(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fp8: torch.dtype,
) -> torch.Tensor:
    """See spec.py. Rows of latent and k_rope may be strided."""
    (num_tokens, rank), dim = latent.shape, k_rope.shape[2]
    to, block = Entries.in_fp8(cache, rank, dim, k_rope.dtype, fp8), next_power_of_two(rank)
    _rms_norm_rope_write_latent_fp8_kernel[(triton.cdiv(num_tokens, TOKENS),)](
        latent, weight, eps, k_rope, positions, cos_sin, to.latents, to.ropes, to.scales, slot_mapping, num_tokens,
        latent.stride(0), k_rope.stride(0), interleaved, to.latent_width, to.rope_width, to.rope_at, to.scale_width,
        to.scale_at, torch.finfo(fp8).max, FLOOR, rank, dim, TOKENS, block, next_power_of_two(dim // 2),
        num_warps=num_warps(TOKENS * block), **overlap(latent.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("rms_norm_rope_write_latent_fp8", "triton", rms_norm_rope_write_latent_fp8)
