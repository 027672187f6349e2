"""write_latent_fp8 in Triton: a warp takes a token, from its channels to the bytes of its entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.mla_attention.entries import Entries
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.quant_fp8.spec import FLOOR
from deepserve.ops.quant_fp8.triton import scale_of, to_fp8

TOKENS = 4  # of a program, a warp each


@triton.jit
def write_entries(
    wide, channel, slot, is_token, latents, scales,
    LATENT_WIDTH: tl.constexpr, SCALE_WIDTH: tl.constexpr, SCALE_AT: tl.constexpr, RANK: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """wide fp32 [TOKENS, channels]: tokens' latents, into the entries of their slots [TOKENS, 1] with a scale each."""
    scale = scale_of(wide, LARGEST, FLOOR, True)
    values = to_fp8(wide, scale, LARGEST, latents.dtype.element_ty)
    tl.store(latents + slot * LATENT_WIDTH + channel, values, is_token & (channel < RANK))
    tl.store(scales + slot * SCALE_WIDTH + SCALE_AT, scale, is_token)


@triton.jit(do_not_specialize=["num_tokens"])
def _write_latent_fp8_kernel(
    latent,  # [T, RANK] at row stride latent_stride
    k_rope,  # [T, DIM] at row stride rope_stride
    latents,  # this, ropes and scales are the views of mla_attention/entries.py:Entries
    ropes,
    scales,
    slot_mapping,
    num_tokens,
    latent_stride,
    rope_stride,
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
    DIM_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    is_token = token < num_tokens
    slot = tl.load(slot_mapping + token, is_token, 0)
    channel = tl.arange(0, RANK_BLOCK)[None, :]
    wide = tl.load(latent + token * latent_stride + channel, is_token & (channel < RANK), 0.0).to(tl.float32)
    pair = tl.arange(0, DIM_BLOCK)[None, :]
    rope = tl.load(k_rope + token * rope_stride + pair, is_token & (pair < DIM))
    tl.store(ropes + slot * ROPE_WIDTH + ROPE_AT + pair, rope, is_token & (pair < DIM))
    write_entries(
        wide, channel, slot, is_token, latents, scales, LATENT_WIDTH, SCALE_WIDTH, SCALE_AT, RANK, LARGEST, FLOOR
    )


def write_latent_fp8(
    latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, fp8: torch.dtype
) -> torch.Tensor:
    """See spec.py."""
    (num_tokens, rank), dim = latent.shape, k_rope.shape[1]
    to, block = Entries.in_fp8(cache, rank, dim, k_rope.dtype, fp8), next_power_of_two(rank)
    _write_latent_fp8_kernel[(triton.cdiv(num_tokens, TOKENS),)](
        latent, k_rope, to.latents, to.ropes, to.scales, slot_mapping, num_tokens, latent.stride(0), k_rope.stride(0),
        to.latent_width, to.rope_width, to.rope_at, to.scale_width, to.scale_at, torch.finfo(fp8).max, FLOOR, rank, dim,
        TOKENS, block, next_power_of_two(dim), num_warps=num_warps(TOKENS * block), **overlap(latent.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("write_latent_fp8", "triton", write_latent_fp8)
