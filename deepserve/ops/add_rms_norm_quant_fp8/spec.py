"""Residual addition, RMS normalisation and FP8 quantisation in one pass."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.add_rms_norm.spec import add_rms_norm
from deepserve.ops.op import Cost, case, nbytes, op
from deepserve.ops.quant_fp8.spec import FP8, quant_fp8
from deepserve.ops.quant_fp8.spec import TOLERANCE as QUANT_TOLERANCE


def _cost(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group: int, *_: Any) -> Cost:
    return Cost(3 * nbytes(x) + nbytes(weight) + x.numel() + 4 * x.numel() // group, 8 * x.numel())


@op(
    fused=True,
    cases=(
        case((1, 128), (1, 128), (128,), 1e-6, 128, False, FP8[0]),
        case((3, 1536), (3, 1536), (1536,), 1e-6, 128, True, FP8[0]),
        case((2, 512), (2, 512), (512,), 1e-6, 128, False, FP8[1]),
        case((4096, 7168), (4096, 7168), (7168,), 1e-6, 128, False, FP8[0], bench=True),
    ),
    tolerance=QUANT_TOLERANCE,
    cost=_cost,
)
def add_rms_norm_quant_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int,
    power_of_two: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], residual [T, H], weight [H] -> (x8 [T, H], scales [T, H / group], new residual [T, H])."""
    normed, residual = add_rms_norm(x, residual, weight, eps)
    x8, scales = quant_fp8(normed, group, power_of_two, dtype)
    return x8, scales, residual
