"""embedding in Triton: a gather of rows, in pieces that a thread copies at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import COPIED_VECTORS, COPY_WARPS, vector_size
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit(do_not_specialize=["num_vectors"])
def _embedding_kernel(
    token_ids,
    weight,
    out,
    num_vectors,  # of all rows
    SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row_vectors: tl.constexpr = SIZE // VECTOR
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = vector < num_vectors
    token_id = tl.load(token_ids + vector // row_vectors, mask, 0)
    lane = tl.arange(0, VECTOR)[None, :]
    source = token_id * SIZE + vector % row_vectors * VECTOR
    target = vector.to(tl.int64) * VECTOR
    values = tl.load(weight + source[:, None] + lane, mask[:, None])
    tl.store(out + target[:, None] + lane, values, mask[:, None])


def embedding(token_ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. weight is contiguous."""
    num_tokens, size = token_ids.shape[0], weight.shape[1]
    out = torch.empty((num_tokens, size), dtype=weight.dtype, device=weight.device) if out is None else out
    vector = vector_size(size)
    num_vectors = num_tokens * size // vector
    _embedding_kernel[(triton.cdiv(num_vectors, COPIED_VECTORS),)](
        token_ids,
        weight,
        out,
        num_vectors,
        size,
        vector,
        COPIED_VECTORS,
        num_warps=COPY_WARPS,
        **overlap(token_ids.device),
    )
    return out


KERNEL = Kernel("embedding", "triton", embedding)
