"""linear_add_rms_norm in Triton: a few rows in two passes, parts of the product and their sum with all that follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.add_rms_norm.triton import add_rms_norm
from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

FEW_ROWS = 16
COLUMNS = 64  # of a program, times CHANNELS: what the registers of its warps hold of the weight
CHANNELS = 512


@triton.jit(do_not_specialize=["num_rows"])
def _linear_parts_kernel(
    x,  # [num_rows, WIDTH] at row stride x_stride
    weight,  # [OUT, WIDTH]
    parts,  # fp32 [programs of channels, num_rows, OUT]
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Transposed, [columns, rows]. The weight is on its way before the kernel that makes x has ended."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    channel = tl.program_id(1) * K + tl.arange(0, K)
    row = tl.arange(0, M)
    mask = (column < OUT)[:, None] & (channel < WIDTH)[None, :]
    left = tl.load(weight + column[:, None].to(tl.int64) * WIDTH + channel[None, :], mask, 0.0)
    wait(OVERLAP)
    mask = (channel < WIDTH)[:, None] & (row < num_rows)[None, :]
    right = tl.load(x + row[None, :] * x_stride + channel[:, None], mask, 0.0)
    total = tl.dot(left, right, input_precision="ieee")
    place = (tl.program_id(1) * num_rows + row)[None, :] * OUT + column[:, None]
    tl.store(parts + place, total, (column < OUT)[:, None] & (row < num_rows)[None, :])


@triton.jit(do_not_specialize=["num_parts"])
def _sum_add_rms_norm_kernel(
    parts,  # fp32 [num_parts, T, SIZE]
    residual,  # [T, SIZE] at row stride residual_stride
    gain,
    normed_out,
    residual_out,
    eps,
    num_parts,
    residual_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, BLOCK)
    mask = channel < SIZE
    total = tl.load(residual + row * residual_stride + channel, mask, 0.0).to(tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + (part * num_rows + row) * SIZE + channel, mask, 0.0)
    rounded = total.to(residual_out.dtype.element_ty)  # before it is normalised, as when separate
    tl.store(residual_out + row * SIZE + channel, rounded, mask)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(normed_out.dtype.element_ty).to(tl.float32)
    normed = normed * tl.load(gain + channel, mask, 0.0).to(tl.float32)
    tl.store(normed_out + row * SIZE + channel, normed.to(normed_out.dtype.element_ty), mask)


def linear_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. weight is contiguous; rows of x and residual may be strided."""
    (num_rows, width), size = x.shape, weight.shape[0]
    if num_rows > FEW_ROWS:
        return add_rms_norm(x @ weight.t(), residual, norm_weight, eps, out)
    normed, total = out or (torch.empty((num_rows, size), dtype=x.dtype, device=x.device) for _ in range(2))
    num_parts = triton.cdiv(width, CHANNELS)
    parts = torch.empty((num_parts, num_rows, size), dtype=torch.float32, device=x.device)
    _linear_parts_kernel[(triton.cdiv(size, COLUMNS), num_parts)](
        x, weight, parts, num_rows, x.stride(0), width, size, FEW_ROWS, COLUMNS, CHANNELS, num_warps=8,
        **overlap(x.device),
    )  # fmt: skip
    block = next_power_of_two(size)
    _sum_add_rms_norm_kernel[(num_rows,)](
        parts, residual, norm_weight, normed, total, eps, num_parts, residual.stride(0), size, block,
        num_warps=min(2 * num_warps(block), 16), **overlap(x.device),
    )  # fmt: skip
    return normed, total


KERNEL = Kernel("linear_add_rms_norm", "triton", linear_add_rms_norm)
