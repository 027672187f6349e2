"""embedding in Triton: a gather of rows, wide enough a program to keep loads of 16 bytes in flight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit
def _embedding_kernel(token_ids, weight, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token_id = tl.load(token_ids + row)
    values = tl.load(weight + token_id * SIZE + channel, channel < SIZE)
    tl.store(out + row * SIZE + channel, values, channel < SIZE)


def embedding(token_ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. weight is contiguous."""
    num_tokens, size = token_ids.shape[0], weight.shape[1]
    out = torch.empty((num_tokens, size), dtype=weight.dtype, device=weight.device) if out is None else out
    block = min(next_power_of_two(size), 2048)
    _embedding_kernel[(num_tokens, triton.cdiv(size, block))](
        token_ids, weight, out, size, block, num_warps=num_warps(block), **overlap(token_ids.device)
    )
    return out


KERNEL = Kernel("embedding", "triton", embedding)
