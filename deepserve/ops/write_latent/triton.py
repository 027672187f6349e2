"""write_latent in Triton: entries in pieces that a thread copies at once, so that none of their 576 lanes is idle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import COPIED_VECTORS, COPY_WARPS, vector_size
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit(do_not_specialize=["num_vectors"])
def _write_latent_kernel(
    latent,  # [T, WIDTH] at row stride row_stride
    cache,  # [slots, WIDTH]
    slot_mapping,
    num_vectors,  # of all tokens
    row_stride,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row_vectors: tl.constexpr = WIDTH // VECTOR
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = vector < num_vectors
    token = (vector // row_vectors).to(tl.int64)
    channel = (vector % row_vectors * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    slot = tl.load(slot_mapping + token, mask, 0)
    piece = tl.load(latent + (token * row_stride)[:, None] + channel, mask[:, None])
    tl.store(cache + (slot * WIDTH)[:, None] + channel, piece.to(cache.dtype.element_ty), mask[:, None])


def write_latent(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """See spec.py."""
    num_tokens, width = latent.shape
    vector = vector_size(width)
    num_vectors = num_tokens * width // vector
    _write_latent_kernel[(triton.cdiv(num_vectors, COPIED_VECTORS),)](
        latent, cache, slot_mapping, num_vectors, latent.stride(0), width, vector, COPIED_VECTORS, num_warps=COPY_WARPS,
        **overlap(latent.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("write_latent", "triton", write_latent)
