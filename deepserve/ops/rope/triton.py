"""rope in Triton: each head's channels are read once, rotated in registers and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import SMALLEST_TILE, next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit
def _rope_kernel(
    x,  # [T, N, DIM] at strides token_stride, head_stride, 1
    positions,
    cos_sin,  # [max_pos, DIM]
    out,  # [T, N, DIM]
    num_heads,
    token_stride,
    head_stride,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # power of two that covers DIM / 2
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    row = cos_sin + tl.load(positions + token) * DIM
    cos = tl.load(row + pair, pair < DIM // 2, 0.0)
    sin = tl.load(row + DIM // 2 + pair, pair < DIM // 2, 0.0)
    source = x + token * token_stride + head * head_stride
    target = out + (token * num_heads + head) * DIM
    if INTERLEAVED:  # whole rows are loaded, so that accesses stay wide; pairs part and meet in registers
        channel = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        mask = (head < num_heads) & (channel < DIM)
        wide = tl.load(source + channel, mask, 0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(wide, (HEADS, HALF_BLOCK, 2)))
        rotated = tl.join(first * cos - second * sin, second * cos + first * sin)
        rotated = tl.reshape(rotated, (HEADS, 2 * HALF_BLOCK))
        tl.store(target + channel, rotated.to(out.dtype.element_ty), mask)
    else:
        mask = (head < num_heads) & (pair < DIM // 2)
        first = tl.load(source + pair, mask, 0.0).to(tl.float32)
        second = tl.load(source + DIM // 2 + pair, mask, 0.0).to(tl.float32)
        tl.store(target + pair, (first * cos - second * sin).to(out.dtype.element_ty), mask)
        tl.store(target + DIM // 2 + pair, (second * cos + first * sin).to(out.dtype.element_ty), mask)


def rope(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See spec.py. x may be a view with strides in its first two dimensions."""
    num_tokens, num_heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    half = next_power_of_two(dim // 2)
    heads = min(next_power_of_two(num_heads), max(SMALLEST_TILE // (2 * half), 1))
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x, positions, cos_sin, out, num_heads, x.stride(0), x.stride(1), dim, interleaved, heads, half,
        num_warps=num_warps(heads * 2 * half), **overlap(x.device),
    )  # fmt: skip
    return out


KERNEL = Kernel("rope", "triton", rope)
