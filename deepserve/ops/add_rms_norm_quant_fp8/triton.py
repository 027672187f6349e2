"""add_rms_norm_quant_fp8 in Triton: x and the residual are read once; FP8 values, scales, residual are written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.quant_fp8.spec import FLOOR
from deepserve.ops.quant_fp8.triton import empty_fp8, scale_of, to_fp8


@triton.jit
def _add_rms_norm_quant_fp8_kernel(
    x,
    residual,
    weight,
    x8,  # [T, SIZE]
    scales,  # [T, ceil(SIZE / GROUP)]
    residual_out,  # [T, SIZE]
    eps,
    x_stride,
    residual_stride,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two that covers a row's groups
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    channel = group * GROUP + tl.arange(0, GROUP)[None, :]
    mask = channel < SIZE
    left = tl.load(x + row * x_stride + channel, mask, 0.0).to(tl.float32)
    right = tl.load(residual + row * residual_stride + channel, mask, 0.0).to(tl.float32)
    gain = tl.load(weight + channel, mask, 0.0).to(tl.float32)
    total = (left + right).to(residual_out.dtype.element_ty)  # rounded before it is normalised, as when separate
    tl.store(residual_out + row * SIZE + channel, total, mask)
    wide = total.to(tl.float32)
    rms = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
    normed = (wide * rms).to(x.dtype.element_ty).to(tl.float32) * gain
    normed = normed.to(x.dtype.element_ty).to(tl.float32)  # what add_rms_norm alone would have written
    scale = scale_of(normed, LARGEST, FLOOR, POWER_OF_TWO)
    row_groups: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    tl.store(scales + row * row_groups + group, scale, group < row_groups)
    tl.store(x8 + row * SIZE + channel, to_fp8(normed, scale, LARGEST, x8.dtype.element_ty), mask)


def add_rms_norm_quant_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int,
    power_of_two: bool,
    dtype: torch.dtype,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See spec.py. group is a power of two; rows of x and residual may be strided."""
    num_rows, size = x.shape
    total = torch.empty((num_rows, size), dtype=x.dtype, device=x.device) if out is None else out[2]
    x8, scales = empty_fp8(num_rows, size, group, dtype, x.device) if out is None else out[:2]
    groups = next_power_of_two(scales.shape[1])
    _add_rms_norm_quant_fp8_kernel[(num_rows,)](
        x, residual, weight, x8, scales, total, eps, x.stride(0), residual.stride(0), torch.finfo(dtype).max, FLOOR,
        power_of_two, size, group, groups, num_warps=num_warps(groups * group), **overlap(x.device),
    )  # fmt: skip
    return x8, scales, total


KERNEL = Kernel("add_rms_norm_quant_fp8", "triton", add_rms_norm_quant_fp8)
