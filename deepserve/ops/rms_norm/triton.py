"""rms_norm in Triton: one read of x, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import row_tile
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,  # element [row // INNER, row % INNER, channel] at the two strides and 1
    weight,
    out,  # [num_rows, SIZE]
    eps,
    num_rows,
    outer_stride,
    inner_stride,
    INNER: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (channel < SIZE)
    start = (row // INNER) * outer_stride + (row % INNER) * inner_stride
    wide = tl.load(x + start + channel, mask, 0.0).to(tl.float32)
    gain = tl.load(weight + channel, channel < SIZE, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / SIZE + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32) * gain  # rounded, then weighted: two roundings
    tl.store(out + row * SIZE + channel, normed.to(out.dtype.element_ty), mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. x may be a view with strides in its first two dimensions."""
    size = x.shape[-1]
    rows_of = x.view(-1, 1, size) if x.dim() == 2 else x.view(-1, *x.shape[-2:])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    num_rows, inner = rows_of.shape[0] * rows_of.shape[1], rows_of.shape[1]
    rows, block, warps = row_tile(size)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        rows_of, weight, out, eps, num_rows, rows_of.stride(0), rows_of.stride(1), inner, size, rows, block,
        num_warps=warps, **overlap(x.device),
    )  # fmt: skip
    return out


KERNEL = Kernel("rms_norm", "triton", rms_norm)
