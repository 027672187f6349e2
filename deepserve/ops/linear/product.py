"""A matrix product in Triton, as narrow as its rows are few: what linear and head_matmul share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.overlap import overlap, wait


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x,  # [num_rows, WIDTH] at row stride x_stride
    weight,  # [OUT, WIDTH]
    bias,  # [OUT] or None
    out,  # [num_rows, OUT]
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Transposed, [columns, rows]: a few rows would leave matrix instructions empty. They sum 16 channels at once, one
    16 after the other, whatever N, M and K are."""
    wait(OVERLAP)
    column = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    channel = tl.arange(0, K)
    left = weight + column[:, None].to(tl.int64) * WIDTH + channel[None, :]
    right = x + row[None, :] * x_stride + channel[:, None]
    total = tl.zeros((N, M), tl.float32)
    for start in range(0, WIDTH, K):
        inside = start + channel < WIDTH
        a = tl.load(left + start, (column < OUT)[:, None] & inside[None, :], 0.0)
        b = tl.load(right + start, inside[:, None] & (row < num_rows)[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column, column < OUT, 0.0).to(tl.float32)[:, None]
    mask = (column < OUT)[:, None] & (row < num_rows)[None, :]
    tl.store(out + row[None, :] * OUT + column[:, None], total.to(out.dtype.element_ty), mask)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """x [T, WIDTH] times the transpose of weight [OUT, WIDTH], plus bias [OUT], to out [T, OUT] in its dtype.

    tile: columns, rows, channels, warps and stages. weight is contiguous; rows of x may be strided.
    """
    (num_rows, width), columns = x.shape, weight.shape[0]
    n, m, k, warps, stages = tile
    _product_kernel[(triton.cdiv(columns, n), triton.cdiv(num_rows, m))](
        x, weight, bias, out, num_rows, x.stride(0), width, columns, n, m, k, num_warps=warps, num_stages=stages,
        **overlap(x.device),
    )  # fmt: skip
    return out
