"""RMS normalisation and FP8 quantisation in one pass: the input of an FP8 projection."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.op import Cost, case, nbytes, op
from deepserve.ops.quant_fp8.spec import FP8, TOLERANCE, quant_fp8
from deepserve.ops.rms_norm.spec import rms_norm


def _cost(x: torch.Tensor, weight: torch.Tensor, eps: float, group: int, *_: Any) -> Cost:
    return Cost(nbytes(x, weight) + x.numel() + 4 * x.numel() // group, 7 * x.numel())


@op(
    fused=True,
    cases=(
        case((1, 128), (128,), 1e-6, 128, False, FP8[0]),
        case((3, 1536), (1536,), 1e-6, 128, True, FP8[0]),
        case((2, 512), (512,), 1e-6, 128, False, FP8[1]),
        case((4096, 7168), (7168,), 1e-6, 128, False, FP8[0], bench=True),
        case((32768, 7168), (7168,), 1e-6, 128, False, FP8[0], bench=True),
    ),
    tolerance=TOLERANCE,
    cost=_cost,
)
def rms_norm_quant_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, group: int, power_of_two: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H], weight [H] -> (x8 [T, H], scales [T, H / group]) of the normalised rows; see rms_norm and quant_fp8."""
    return quant_fp8(rms_norm(x, weight, eps), group, power_of_two, dtype)
