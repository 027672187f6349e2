"""head_matmul in Triton: a few rows, while the weight streams by; for many, the vendor's product where it has one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import chip
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

FEW_ROWS = 64


@triton.jit(do_not_specialize=["num_rows"])
def _head_matmul_kernel(
    hidden,  # [num_rows, WIDTH] at row stride hidden_stride
    weight,  # [OUT, WIDTH]
    out,  # fp32 [num_rows, OUT]
    num_rows,
    hidden_stride,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Transposed, [columns, rows]: a few rows would leave matrix instructions empty."""
    wait(OVERLAP)
    column = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.program_id(1) * M + tl.arange(0, M)
    channel = tl.arange(0, K)
    left = weight + column[:, None].to(tl.int64) * WIDTH + channel[None, :]
    right = hidden + row[None, :] * hidden_stride + channel[:, None]
    total = tl.zeros((N, M), tl.float32)
    for start in range(0, WIDTH, K):
        inside = start + channel < WIDTH
        a = tl.load(left + start, (column < OUT)[:, None] & inside[None, :], 0.0)
        b = tl.load(right + start, inside[:, None] & (row < num_rows)[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    place = row[None, :].to(tl.int64) * OUT + column[:, None]
    tl.store(out + place, total, (column < OUT)[:, None] & (row < num_rows)[None, :])


def head_matmul(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. weight is contiguous."""
    (num_rows, width), columns, wide = hidden.shape, weight.shape[0], hidden.element_size() > 2
    out = torch.empty((num_rows, columns), dtype=torch.float32, device=hidden.device) if out is None else out
    is_amd = chip(hidden.device).is_amd
    if hidden.device.type == "cuda" and num_rows > FEW_ROWS and not wide and not is_amd:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    m = 16 if num_rows <= 16 else 64
    k, stages = (32, 1) if wide else (128, 2 if is_amd else 4 if m == 16 else 3)
    _head_matmul_kernel[(triton.cdiv(columns, 64), triton.cdiv(num_rows, m))](
        hidden, weight, out, num_rows, hidden.stride(0), width, columns, m, 64, k, num_warps=4, num_stages=stages,
        **overlap(hidden.device),
    )  # fmt: skip
    return out


KERNEL = Kernel("head_matmul", "triton", head_matmul)
