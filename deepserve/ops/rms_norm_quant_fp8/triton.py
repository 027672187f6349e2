"""rms_norm_quant_fp8 in Triton: x is read once, FP8 values and scales are written once."""

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
def _rms_norm_quant_fp8_kernel(
    x,
    weight,
    x8,  # [T, SIZE]
    scales,  # [T, ceil(SIZE / GROUP)]
    eps,
    row_stride,
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
    wide = tl.load(x + row * row_stride + channel, mask, 0.0).to(tl.float32)
    gain = tl.load(weight + channel, mask, 0.0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
    normed = (wide * rms).to(x.dtype.element_ty).to(tl.float32) * gain
    normed = normed.to(x.dtype.element_ty).to(tl.float32)  # what rms_norm alone would have written
    scale = scale_of(normed, LARGEST, FLOOR, POWER_OF_TWO)
    row_groups: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    tl.store(scales + row * row_groups + group, scale, group < row_groups)
    tl.store(x8 + row * SIZE + channel, to_fp8(normed, scale, LARGEST, x8.dtype.element_ty), mask)


def rms_norm_quant_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int,
    power_of_two: bool,
    dtype: torch.dtype,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. group is a power of two; rows of x may be strided."""
    num_rows, size = x.shape
    x8, scales = out or empty_fp8(num_rows, size, group, dtype, x.device)
    groups = next_power_of_two(scales.shape[1])
    _rms_norm_quant_fp8_kernel[(num_rows,)](
        x, weight, x8, scales, eps, x.stride(0), torch.finfo(dtype).max, FLOOR, power_of_two, size, group, groups,
        num_warps=min(num_warps(groups * group), 8), **overlap(x.device),  # 16 wait for one another
    )  # fmt: skip
    return x8, scales


KERNEL = Kernel("rms_norm_quant_fp8", "triton", rms_norm_quant_fp8)
