"""rope_write_mla_attention in Triton: for a few tokens all that comes before the attention is one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two
from deepserve.ops.mla_attention.entries import Entries
from deepserve.ops.mla_attention.triton import decode, mla_attention
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.rms_norm_rope_write_latent.triton import rms_norm_rope_write_latent
from deepserve.ops.rope.triton import rope
from deepserve.runner.batch import Batch

FEW_TOKENS = 64
COLUMNS = 64  # channels of the latent of a program


@triton.jit
def _rotate(source, target, row_mask, cos, sin, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr):
    """Channels at source [M, 1], rotated by cos and sin [M, HALF], to target."""
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    OTHER: tl.constexpr = 1 if INTERLEAVED else DIM // 2
    pair = tl.arange(0, HALF)[None, :]
    mask = row_mask & (pair < DIM // 2)
    first = tl.load(source + pair * STEP, mask, 0.0)
    second = tl.load(source + pair * STEP + OTHER, mask, 0.0).to(tl.float32)
    dtype = first.dtype
    first = first.to(tl.float32)
    tl.store(target + pair * STEP, (first * cos - second * sin).to(dtype), mask)
    tl.store(target + pair * STEP + OTHER, (second * cos + first * sin).to(dtype), mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _before_attention_kernel(
    q_nope,  # [T, N, NOPE] at strides nope_row, nope_head, 1
    q_rope,  # [T, N, DIM] at strides rope_row, rope_head, 1
    latent,  # [T, RANK] at row stride latent_row
    gain,
    eps,
    k_rope,  # [T, DIM] at row stride key_row
    positions,
    cos_sin,  # [max_pos, DIM]
    cache,  # [slots, RANK + DIM]
    slot_mapping,
    w_uk,  # [N, NOPE, RANK] at strides uk_head, RANK, 1
    q_latent,  # [N, T, RANK]
    rotated,  # [T, N, DIM]
    num_tokens,
    nope_row,
    nope_head,
    rope_row,
    rope_head,
    latent_row,
    key_row,
    uk_head,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NOPE: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    HALF: tl.constexpr,  # power of two that covers DIM / 2
    RANK_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program of a head absorbs W_UK into its queries, N channels of the latent; of those with the first channels,
    each also rotates its queries. One more writes the entries of the cache.
    """
    head, part = tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, NOPE_BLOCK)
    column = part * N + tl.arange(0, N)
    is_weight = (column < RANK)[:, None] & (channel < NOPE)[None, :]
    weight = w_uk + tl.minimum(head, HEADS - 1) * uk_head
    left = tl.load(weight + column[:, None] + channel[None, :] * RANK, is_weight, 0.0)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    is_row = row < num_tokens
    if head < HEADS:
        is_query = (channel < NOPE)[:, None] & is_row[None, :]
        right = tl.load(q_nope + row[None, :] * nope_row + head * nope_head + channel[:, None], is_query, 0.0)
        y = tl.dot(left, right, input_precision="ieee").to(q_latent.dtype.element_ty)
        place = (head.to(tl.int64) * num_tokens + row[None, :]) * RANK + column[:, None]
        tl.store(q_latent + place, y, (column < RANK)[:, None] & is_row[None, :])
    if part == 0:
        pair = tl.arange(0, HALF)[None, :]
        angle = cos_sin + tl.load(positions + row, is_row, 0)[:, None] * DIM + pair
        cos = tl.load(angle, pair < DIM // 2, 0.0)
        sin = tl.load(angle + DIM // 2, pair < DIM // 2, 0.0)
        if head < HEADS:
            source = q_rope + row[:, None] * rope_row + head * rope_head
            target = rotated + (row[:, None] * HEADS + head) * DIM
            _rotate(source, target, is_row[:, None], cos, sin, INTERLEAVED, DIM, HALF)
        else:
            entry = cache + tl.load(slot_mapping + row, is_row, 0)[:, None] * (RANK + DIM)
            wide_channel = tl.arange(0, RANK_BLOCK)[None, :]
            is_latent = is_row[:, None] & (wide_channel < RANK)
            values = tl.load(latent + row[:, None] * latent_row + wide_channel, is_latent, 0.0)
            wide = values.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / RANK + eps)
            factor = tl.load(gain + wide_channel, wide_channel < RANK, 0.0).to(tl.float32)
            normed = (wide * scale).to(values.dtype).to(tl.float32) * factor  # rounded, then weighted: two roundings
            tl.store(entry + wide_channel, normed.to(values.dtype), is_latent)
            _rotate(k_rope + row[:, None] * key_row, entry + RANK, is_row[:, None], cos, sin, INTERLEAVED, DIM, HALF)


def rope_write_mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See spec.py. The last dimensions are contiguous."""
    (num_tokens, heads, nope), rank, dim = q_nope.shape, w_uk.shape[2], q_rope.shape[2]
    if num_tokens > FEW_TOKENS or batch.num_single < num_tokens:
        rotated = rope(q_rope, positions, cos_sin, interleaved)
        rms_norm_rope_write_latent(
            latent, norm_weight, eps, k_rope, positions, cos_sin, interleaved, cache, slot_mapping
        )
        return mla_attention(q_nope, rotated, cache, w_uk, w_uv, batch, scale, out)
    q_latent = torch.empty((heads, num_tokens, rank), dtype=q_nope.dtype, device=q_nope.device)
    rotated = torch.empty((num_tokens, heads, dim), dtype=q_nope.dtype, device=q_nope.device)
    if out is None:
        out = torch.empty((num_tokens, heads, w_uv.shape[1]), dtype=q_nope.dtype, device=q_nope.device)
    m = 16 if num_tokens <= 16 else 32
    _before_attention_kernel[(triton.cdiv(num_tokens, m), heads + 1, triton.cdiv(rank, COLUMNS))](
        q_nope, q_rope, latent, norm_weight, eps, k_rope, positions, cos_sin, cache, slot_mapping, w_uk, q_latent,
        rotated, num_tokens, q_nope.stride(0), q_nope.stride(1), q_rope.stride(0), q_rope.stride(1), latent.stride(0),
        k_rope.stride(0), w_uk.stride(0), heads, interleaved, nope, dim, rank, max(next_power_of_two(nope), 16),
        next_power_of_two(dim // 2), next_power_of_two(rank), m, COLUMNS, num_warps=4, **overlap(q_nope.device),
    )  # fmt: skip
    decode(q_latent, rotated, Entries.plain(cache, rank), w_uv, batch, scale, out)
    return out


KERNEL = Kernel("rope_write_mla_attention", "triton", rope_write_mla_attention)
