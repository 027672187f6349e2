"""silu_mul_quant_fp8 in Triton: gate and up are read once, FP8 values and scales are written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.quant_fp8.spec import FLOOR
from deepserve.ops.quant_fp8.triton import GROUPS, empty_fp8, scale_of, to_fp8


@triton.jit(do_not_specialize=["num_groups"])
def _silu_mul_quant_fp8_kernel(
    gate_up,
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
    gate = tl.load(gate_up + row * row_stride + channel, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + SIZE + channel, mask, 0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    product = product.to(gate_up.dtype.element_ty).to(tl.float32)  # what silu_mul alone would have written
    scale = scale_of(product, LARGEST, FLOOR, POWER_OF_TWO)
    tl.store(scales + group, scale, group < num_groups)
    tl.store(x8 + row * SIZE + channel, to_fp8(product, scale, LARGEST, x8.dtype.element_ty), mask)


def silu_mul_quant_fp8(
    gate_up: torch.Tensor,
    group: int,
    power_of_two: bool,
    dtype: torch.dtype,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. group is a power of two; rows of gate_up may be strided."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    x8, scales = out or empty_fp8(num_rows, size, group, dtype, gate_up.device)
    _silu_mul_quant_fp8_kernel[(triton.cdiv(scales.numel(), GROUPS),)](
        gate_up, x8, scales, scales.numel(), gate_up.stride(0), torch.finfo(dtype).max, FLOOR, power_of_two, size,
        group, GROUPS, num_warps=num_warps(GROUPS * group), **overlap(gate_up.device),
    )  # fmt: skip
    return x8, scales


KERNEL = Kernel("silu_mul_quant_fp8", "triton", silu_mul_quant_fp8)
