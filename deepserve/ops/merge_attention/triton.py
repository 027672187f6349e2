"""merge_attention in Triton: both means are read once, their sum is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import SMALLEST_TILE, next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit(do_not_specialize=["num_rows"])
def _merge_attention_kernel(
    a,  # this, b and out [num_rows, SIZE]
    a_log_sum,  # this, b_log_sum and log_sum_out [num_rows]
    b,
    b_log_sum,
    out,
    log_sum_out,
    num_rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)[None, :]
    left = tl.load(a_log_sum + row, row < num_rows, 0.0)
    right = tl.load(b_log_sum + row, row < num_rows, 0.0)
    top = tl.maximum(left, right)
    shift = tl.where(top == float("-inf"), 0.0, top)
    left, right = tl.exp2(left - shift), tl.exp2(right - shift)
    total = left + right
    tl.store(log_sum_out + row, shift + tl.log2(total), row < num_rows)
    total = tl.where(total > 0, total, 1.0)
    mask = (row < num_rows)[:, None] & (channel < SIZE)
    place = row[:, None] * SIZE + channel
    mean = tl.load(a + place, mask, 0.0) * (left / total)[:, None]
    mean += tl.load(b + place, mask, 0.0) * (right / total)[:, None]
    tl.store(out + place, mean, mask)


def merge_attention(
    a: torch.Tensor,
    a_log_sum: torch.Tensor,
    b: torch.Tensor,
    b_log_sum: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. All are contiguous; `out` may be (a, a_log_sum) themselves."""
    mean, log_sum = out or (torch.empty_like(a), torch.empty_like(a_log_sum))
    size = a.shape[-1]
    block = next_power_of_two(size)
    rows = max(2 * SMALLEST_TILE // block, 1)
    _merge_attention_kernel[(triton.cdiv(a_log_sum.numel(), rows),)](
        a, a_log_sum, b, b_log_sum, mean, log_sum, a_log_sum.numel(), size, rows, block,
        num_warps=num_warps(2 * rows * block), **overlap(a.device),
    )  # fmt: skip
    return mean, log_sum


KERNEL = Kernel("merge_attention", "triton", merge_attention)
