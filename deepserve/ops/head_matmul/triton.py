"""head_matmul in Triton: a few rows, while the weight streams by; for many, the vendor's product where it has one."""

from __future__ import annotations

import torch

from deepserve.ops.launch import chip
from deepserve.ops.linear.product import product
from deepserve.ops.op import Kernel

FEW_ROWS = 64


def head_matmul(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. weight is contiguous."""
    num_rows, wide, is_amd = len(hidden), hidden.element_size() > 2, chip(hidden.device).is_amd
    if out is None:
        out = torch.empty((num_rows, len(weight)), dtype=torch.float32, device=hidden.device)
    if hidden.device.type == "cuda" and num_rows > FEW_ROWS and not wide and not is_amd:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    m = 16 if num_rows <= 16 else 64
    k, stages = (32, 1) if wide else (128, 2 if is_amd else 4 if m == 16 else 3)
    return product(hidden, weight, None, out, (64, m, k, 4, stages))


KERNEL = Kernel("head_matmul", "triton", head_matmul)
