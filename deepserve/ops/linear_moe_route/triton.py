"""linear_moe_route in Triton: partial logits by many programs, which the routing kernel sums up.

The weight is packed as three bf16 parts, 24 bits in all: with x exact in bf16, three products on matrix units are what
one in fp32 would be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import chip, next_power_of_two
from deepserve.ops.moe_route.triton import route
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

MAX_PARTS = 8


@triton.jit(do_not_specialize=["num_rows"])
def _logits_kernel(
    x,  # [num_rows, WIDTH] at row stride row_stride
    weight,  # bf16 [3, OUT, WIDTH]
    out,  # fp32 [PARTS, num_rows, OUT]
    num_rows,
    row_stride,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    PART: tl.constexpr,  # channels of a program
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    channel = tl.program_id(2) * PART + tl.arange(0, K)
    left = x + row[:, None] * row_stride + channel[None, :]
    right = weight + column[None, :] * WIDTH + channel[:, None]
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, PART, K):
        inside = start + channel < WIDTH
        mask = inside[:, None] & (column < OUT)[None, :]
        a = tl.load(left + start, (row < num_rows)[:, None] & inside[None, :], 0.0)
        high = tl.load(right + start, mask, 0.0)
        middle = tl.load(right + OUT * WIDTH + start, mask, 0.0)
        low = tl.load(right + 2 * OUT * WIDTH + start, mask, 0.0)
        if a.dtype == tl.bfloat16:
            total = tl.dot(a, low, total)
            total = tl.dot(a, middle, total)
            total = tl.dot(a, high, total)
        else:
            whole = high.to(tl.float32) + middle.to(tl.float32) + low.to(tl.float32)
            total = tl.dot(a.to(tl.float32), whole, total, input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * num_rows + row[:, None]) * OUT + column[None, :]
    tl.store(out + place, total, (row < num_rows)[:, None] & (column < OUT)[None, :])


def pack(weight: torch.Tensor) -> torch.Tensor:
    """fp32 [E, H] -> bf16 [3, E, H] whose sum it is."""
    parts, rest = [], weight
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return torch.stack(parts)


def linear_moe_route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    scoring: str,
    selection: str,
    renormalize: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py; weight is packed. Rows of x may be strided."""
    (num_rows, width), columns = x.shape, weight.shape[1]
    found = chip(x.device)
    m, n, k = (16, 16, 128) if num_rows <= 64 else (64, 64, 64)
    if x.element_size() > 2 or x.dtype is torch.float16:
        m, n, k = 16, 16, 64
    blocks = triton.cdiv(num_rows, m) * triton.cdiv(columns, n)
    parts = min(MAX_PARTS, triton.cdiv(width, k), next_power_of_two(max(found.num_multiprocessors // blocks, 1)))
    part = triton.cdiv(triton.cdiv(width, k), parts) * k
    parts = triton.cdiv(width, part)
    logits = torch.empty((parts, num_rows, columns), dtype=torch.float32, device=x.device)
    _logits_kernel[(triton.cdiv(num_rows, m), triton.cdiv(columns, n), parts)](
        x, weight, logits, num_rows, x.stride(0), width, columns, part, m, n, k, num_warps=4,
        num_stages=2 if found.is_amd else 3, **overlap(x.device),
    )  # fmt: skip
    return route(logits, bias, top_k, num_groups, top_k_groups, scoring, selection, renormalize, factor)


KERNEL = Kernel("linear_moe_route", "triton", linear_moe_route, {"weight": pack})
