"""argmax in Triton: parts of each row in parallel, then the best of the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two
from deepserve.ops.op import Kernel

PART = 8192  # of a vocabulary: 16 programs for each row of 129280


@triton.jit
def _argmax_parts_kernel(logits, values, indices, row_stride, vocab_size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    row_part = tl.load(logits + row * row_stride + column, column < vocab_size, float("-inf"))
    value, index = tl.max(row_part, 0, return_indices=True)  # the leftmost among equals
    tl.store(values + row * PARTS + part, value)
    tl.store(indices + row * PARTS + part, part * BLOCK + index)


@triton.jit
def _argmax_kernel(values, indices, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    best = tl.argmax(tl.load(values + row * PARTS + part, part < PARTS, float("-inf")), 0)
    tl.store(out + row, tl.load(indices + row * PARTS + best).to(tl.int64))


def argmax(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. Rows may be strided."""
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    block = min(next_power_of_two(vocab_size), PART)
    parts = triton.cdiv(vocab_size, block)
    values = torch.empty((num_rows, parts), dtype=logits.dtype, device=logits.device)
    indices = torch.empty((num_rows, parts), dtype=torch.int32, device=logits.device)
    _argmax_parts_kernel[(num_rows, parts)](
        logits, values, indices, logits.stride(0), vocab_size, parts, block, num_warps=8
    )
    _argmax_kernel[(num_rows,)](values, indices, out, parts, next_power_of_two(parts), num_warps=1)
    return out


KERNEL = Kernel("argmax", "triton", argmax)
