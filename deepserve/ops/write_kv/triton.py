"""write_kv in Triton: rows in pieces that a thread copies at once, K and V together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import COPIED_VECTORS, COPY_WARPS, vector_size
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit(do_not_specialize=["num_vectors"])
def _write_kv_kernel(
    k,  # [T, N, DIM] at strides k_token_stride, k_head_stride, 1; v likewise
    v,
    cache,  # [num_blocks, 2, BLOCK_SIZE, N, DIM]
    slot_mapping,
    num_vectors,  # of all tokens' keys
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    head_vectors: tl.constexpr = DIM // VECTOR
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (vector < num_vectors)[:, None]
    row = vector // head_vectors
    token, head = (row // NUM_HEADS).to(tl.int64)[:, None], (row % NUM_HEADS)[:, None]
    channel = (vector % head_vectors * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    slot = tl.load(slot_mapping + token, mask, 0)
    key = tl.load(k + token * k_token_stride + head * k_head_stride + channel, mask)
    value = tl.load(v + token * v_token_stride + head * v_head_stride + channel, mask)
    entry = slot // BLOCK_SIZE * (2 * BLOCK_SIZE) + slot % BLOCK_SIZE  # of K; that of V is BLOCK_SIZE further
    target = cache + entry * (NUM_HEADS * DIM) + head * DIM + channel
    tl.store(target, key.to(cache.dtype.element_ty), mask)
    tl.store(target + BLOCK_SIZE * NUM_HEADS * DIM, value.to(cache.dtype.element_ty), mask)


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """See spec.py."""
    num_heads, dim = k.shape[1:]
    vector = vector_size(dim)
    num_vectors = k.numel() // vector
    _write_kv_kernel[(triton.cdiv(num_vectors, COPIED_VECTORS),)](
        k, v, cache, slot_mapping, num_vectors, k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache.shape[2],
        num_heads, dim, vector, COPIED_VECTORS, num_warps=COPY_WARPS, **overlap(k.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("write_kv", "triton", write_kv)
