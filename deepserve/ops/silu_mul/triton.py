"""silu_mul in Triton: gate and up are read once, the product written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit
def _silu_mul_kernel(gate_up, out, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < SIZE
    gate = tl.load(gate_up + row * row_stride + channel, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + SIZE + channel, mask, 0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + channel, product.to(out.dtype.element_ty), mask)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. The last dimension of gate_up is contiguous."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    block = min(next_power_of_two(size), 2048)
    _silu_mul_kernel[(num_rows, triton.cdiv(size, block))](
        gate_up, out, gate_up.stride(0), size, block, num_warps=num_warps(block), **overlap(gate_up.device)
    )
    return out


KERNEL = Kernel("silu_mul", "triton", silu_mul)
