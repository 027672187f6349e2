"""linear in Triton where a single row streams the weight by; everything else is the vendor's matrix product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

COLUMNS = 8  # of a program of 8 warps: more would leave a multiprocessor room for only one
AT_ONCE = 2048
MOST_COLUMNS = 5120  # of a weight: from here on there is enough of it for the vendor's kernel to reach the bandwidth


@triton.jit
def _row_product_kernel(
    x,  # [1, WIDTH]
    weight,  # [OUT, WIDTH]
    bias,  # [OUT] or None
    out,  # [1, OUT]
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The weight is on its way before the kernel that makes x has ended."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.arange(0, BLOCK)
    rows = weight + column[:, None].to(tl.int64) * WIDTH + channel[None, :]
    EXACT: tl.constexpr = (OUT % COLUMNS == 0) and (WIDTH % BLOCK == 0)  # masks would cost registers
    if EXACT:
        part = tl.load(rows)
    else:
        part = tl.load(rows, (column < OUT)[:, None] & (channel < WIDTH)[None, :], 0.0)
    wait(OVERLAP)
    row = tl.load(x + channel, channel < WIDTH, 0.0).to(tl.float32)
    total = tl.sum(part.to(tl.float32) * row[None, :], 1)
    for start in range(BLOCK, WIDTH, BLOCK):
        inside = start + channel < WIDTH
        part = tl.load(rows + start, (column < OUT)[:, None] & inside[None, :], 0.0)
        row = tl.load(x + start + channel, inside, 0.0).to(tl.float32)
        total += tl.sum(part.to(tl.float32) * row[None, :], 1)
    if bias is not None:
        total += tl.load(bias + column, column < OUT, 0.0).to(tl.float32)
    tl.store(out + column, total.to(out.dtype.element_ty), column < OUT)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See spec.py. weight is contiguous."""
    (num_rows, width), columns = x.shape, weight.shape[0]
    if num_rows > 1 or columns > MOST_COLUMNS:
        return torch.nn.functional.linear(x, weight, bias)
    out = torch.empty((1, columns), dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(width), AT_ONCE)
    _row_product_kernel[(triton.cdiv(columns, COLUMNS),)](
        x, weight, bias, out, width, columns, COLUMNS, block, num_warps=8, **overlap(x.device)
    )
    return out


KERNEL = Kernel("linear", "triton", linear)
