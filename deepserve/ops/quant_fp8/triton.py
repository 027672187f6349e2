"""quant_fp8 in Triton: each group is read once, its scale found and its values written in registers.

`scale_of` and `to_fp8` are what every op that ends in FP8 shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.quant_fp8.spec import FLOOR

GROUPS = 16  # a program


@triton.jit
def scale_of(grouped, LARGEST: tl.constexpr, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of each row of `grouped` [groups, group] fp32, as [groups, 1]; divisions rounded as IEEE says."""
    amax = tl.maximum(tl.max(tl.abs(grouped), 1, keep_dims=True), FLOOR)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    if POWER_OF_TWO:  # the exponent, plus one where the mantissa is not 0
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def to_fp8(grouped, scale, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """grouped / scale, clamped to the format's range and rounded to nearest even.

    The quotient is div_rn's, by its own last steps (Markstein 1990): a product with the reciprocal, and what is left of
    it added. div_rn itself finds a reciprocal for each element, and branches, which keeps all others waiting. Nothing
    overflows, and what could be lost below fp32's least numbers is far below FP8's.
    """
    inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), grouped.shape)
    near = grouped * inverse
    left = tl.fma(-near, tl.broadcast_to(scale, grouped.shape), grouped)
    scaled = tl.fma(left, inverse, near)
    return tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(dtype)


@triton.jit(do_not_specialize=["num_groups"])
def _quant_fp8_kernel(
    x,
    x8,  # [T, SIZE]
    scales,  # [T, ceil(SIZE / GROUP)]
    num_groups,  # of all rows
    row_stride,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row_groups: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    row = group // row_groups
    channel = group % row_groups * GROUP + tl.arange(0, GROUP)[None, :]
    mask = (group < num_groups) & (channel < SIZE)
    grouped = tl.load(x + row * row_stride + channel, mask, 0.0).to(tl.float32)
    scale = scale_of(grouped, LARGEST, FLOOR, POWER_OF_TWO)
    tl.store(scales + group, scale, group < num_groups)
    tl.store(x8 + row * SIZE + channel, to_fp8(grouped, scale, LARGEST, x8.dtype.element_ty), mask)


def empty_fp8(
    num_rows: int, size: int, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for quantised rows and their scales."""
    scales = torch.empty((num_rows, triton.cdiv(size, group)), dtype=torch.float32, device=device)
    return torch.empty((num_rows, size), dtype=dtype, device=device), scales


def quant_fp8(
    x: torch.Tensor,
    group: int,
    power_of_two: bool,
    dtype: torch.dtype,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. group is a power of two; rows of x may be strided."""
    num_rows, size = x.shape
    x8, scales = out or empty_fp8(num_rows, size, group, dtype, x.device)
    largest = torch.finfo(dtype).max
    _quant_fp8_kernel[(triton.cdiv(scales.numel(), GROUPS),)](
        x, x8, scales, scales.numel(), x.stride(0), largest, FLOOR, power_of_two, size, group, GROUPS,
        num_warps=num_warps(GROUPS * group), **overlap(x.device),
    )  # fmt: skip
    return x8, scales


KERNEL = Kernel("quant_fp8", "triton", quant_fp8)
