"""softmax in Triton: the largest value and the sum of exponentials of parts of each row, then the probabilities.

A row of a large vocabulary fits into no program's registers, so logits are read twice and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two
from deepserve.ops.op import Kernel

PART = 8192  # of a vocabulary: 16 programs for each row of 129280


@triton.jit
def _softmax_parts_kernel(
    logits, temperature, largest, sums, row_stride, vocab_size, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(logits + row * row_stride + column, column < vocab_size, float("-inf"))
    scaled = scaled / tl.load(temperature + row)
    top = tl.max(scaled, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)  # a part that is all -inf has the sum 0
    tl.store(largest + row * PARTS + part, top)
    tl.store(sums + row * PARTS + part, tl.sum(tl.exp(scaled - shift), 0))


@triton.jit
def _softmax_kernel(
    logits,
    temperature,
    largest,  # this and the next [S, PARTS]
    sums,
    out,
    row_stride,
    vocab_size,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)
    tops = tl.load(largest + row * PARTS + part, part < PARTS, float("-inf"))
    top = tl.max(tops, 0)
    total = tl.sum(tl.exp(tops - top) * tl.load(sums + row * PARTS + part, part < PARTS, 0.0), 0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(logits + row * row_stride + column, column < vocab_size, float("-inf"))
    scaled = scaled / tl.load(temperature + row)
    tl.store(out + row * vocab_size + column, tl.exp(scaled - top) / total, column < vocab_size)


def softmax(logits: torch.Tensor, temperature: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. Rows may be strided."""
    num_rows, vocab_size = logits.shape
    out = torch.empty((num_rows, vocab_size), dtype=logits.dtype, device=logits.device) if out is None else out
    block = min(next_power_of_two(vocab_size), PART)
    parts = triton.cdiv(vocab_size, block)
    largest, sums = torch.empty((2, num_rows, parts), dtype=logits.dtype, device=logits.device)
    grid, stride = (num_rows, parts), logits.stride(0)
    _softmax_parts_kernel[grid](logits, temperature, largest, sums, stride, vocab_size, parts, block, num_warps=8)
    _softmax_kernel[grid](
        logits, temperature, largest, sums, out, stride, vocab_size, parts, next_power_of_two(parts), block, num_warps=8
    )
    return out


KERNEL = Kernel("softmax", "triton", softmax)
