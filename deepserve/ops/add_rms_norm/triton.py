"""add_rms_norm in Triton: x and the residual are read once, the normed row and the new residual written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import row_tile
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x,  # this and the next [num_rows, SIZE], row strides x_stride and residual_stride
    residual,
    weight,
    normed_out,  # this and the next [num_rows, SIZE]
    residual_out,
    eps,
    num_rows,
    x_stride,
    residual_stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (channel < SIZE)
    left = tl.load(x + row * x_stride + channel, mask, 0.0).to(tl.float32)
    right = tl.load(residual + row * residual_stride + channel, mask, 0.0).to(tl.float32)
    gain = tl.load(weight + channel, channel < SIZE, 0.0).to(tl.float32)
    total = (left + right).to(residual_out.dtype.element_ty)  # rounded before it is normalised, as when separate
    tl.store(residual_out + row * SIZE + channel, total, mask)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / SIZE + eps)
    normed = (wide * scale).to(normed_out.dtype.element_ty).to(
        tl.float32
    ) * gain  # rounded, then weighted: two roundings
    tl.store(normed_out + row * SIZE + channel, normed.to(normed_out.dtype.element_ty), mask)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. `out` may be (x, residual) themselves: each program reads its rows before it writes them."""
    num_rows, size = x.shape
    normed, total = out or (torch.empty((num_rows, size), dtype=x.dtype, device=x.device) for _ in range(2))
    rows, block, warps = row_tile(size)
    _add_rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x, residual, weight, normed, total, eps, num_rows, x.stride(0), residual.stride(0), size, rows, block,
        num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return normed, total


KERNEL = Kernel("add_rms_norm", "triton", add_rms_norm)
