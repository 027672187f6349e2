"""argmax in Triton: parts of each row in parallel, then the best of the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.fp32_order import LEAST, NAN, key_of, value_of
from deepserve.ops.launch import next_power_of_two
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

PART = 8192  # of a vocabulary: 16 programs for each row of 129280
WARPS = 8


@triton.jit
def _argmax_parts_kernel(
    logits, keys, indices, row_stride, vocab_size, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    column = part * BLOCK + place
    row_part = tl.load(logits + row * row_stride + column, column < vocab_size, float("-inf"))
    best = tl.max(row_part, 0)
    # Of all places that show NaN the first, or else of those that show the best: a search of few instructions each.
    first = tl.where(row_part == best, place + BLOCK, 2 * BLOCK)
    first = tl.min(tl.where(row_part != row_part, place, first), 0)
    tl.store(keys + row * PARTS + part, tl.where(first < BLOCK, NAN, key_of(best)))
    tl.store(indices + row * PARTS + part, part * BLOCK + first % BLOCK)


@triton.jit
def _argmax_kernel(keys, indices, tokens, values, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    key, best = tl.max(tl.load(keys + row * PARTS + part, part < PARTS, LEAST - 1), 0, return_indices=True)
    tl.store(tokens + row, tl.load(indices + row * PARTS + best).to(tl.int64))
    tl.store(values + row, value_of(key))


def argmax(
    logits: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. Rows may be strided."""
    num_rows, vocab_size = logits.shape
    tokens, values = out or (
        torch.empty(num_rows, dtype=torch.int64, device=logits.device),
        torch.empty(num_rows, dtype=torch.float32, device=logits.device),
    )
    block = min(next_power_of_two(vocab_size), PART)
    parts = triton.cdiv(vocab_size, block)
    keys = torch.empty((num_rows, parts), dtype=torch.int32, device=logits.device)
    indices = torch.empty((num_rows, parts), dtype=torch.int32, device=logits.device)
    _argmax_parts_kernel[(num_rows, parts)](
        logits, keys, indices, logits.stride(0), vocab_size, parts, block, num_warps=WARPS, **overlap(logits.device)
    )
    _argmax_kernel[(num_rows,)](
        keys, indices, tokens, values, parts, next_power_of_two(parts), num_warps=1, **overlap(logits.device)
    )
    return tokens, values


KERNEL = Kernel("argmax", "triton", argmax)
