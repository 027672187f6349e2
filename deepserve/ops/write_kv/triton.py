"""write_kv in Triton: one program a token and group of heads, K and V together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import SMALLEST_TILE, next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit
def _write_kv_kernel(
    k,  # [T, N, DIM] at strides k_token_stride, k_head_stride, 1; v likewise
    v,
    cache,  # [num_blocks, 2, BLOCK_SIZE, N, DIM]
    slot_mapping,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (head < NUM_HEADS) & (channel < DIM)
    slot = tl.load(slot_mapping + token)
    row = slot // BLOCK_SIZE * (2 * BLOCK_SIZE) + slot % BLOCK_SIZE  # of K; that of V is BLOCK_SIZE further
    entry = cache + row * (NUM_HEADS * DIM) + head * DIM + channel
    key = tl.load(k + token * k_token_stride + head * k_head_stride + channel, mask)
    value = tl.load(v + token * v_token_stride + head * v_head_stride + channel, mask)
    tl.store(entry, key.to(cache.dtype.element_ty), mask)
    tl.store(entry + BLOCK_SIZE * NUM_HEADS * DIM, value.to(cache.dtype.element_ty), mask)


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """See spec.py."""
    num_tokens, num_heads, dim = k.shape
    block = next_power_of_two(dim)
    heads = min(next_power_of_two(num_heads), max(SMALLEST_TILE // block, 1))
    _write_kv_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        k, v, cache, slot_mapping, k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache.shape[2], num_heads, dim,
        heads, block, num_warps=num_warps(heads * block), **overlap(k.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("write_kv", "triton", write_kv)
