"""Gated activation and FP8 quantisation in one pass: the input of an FP8 down projection."""

from __future__ import annotations

import torch

from deepserve.ops.op import Cost, case, nbytes, op
from deepserve.ops.quant_fp8.spec import FP8, TOLERANCE, quant_fp8
from deepserve.ops.silu_mul.spec import silu_mul


def _cost(gate_up: torch.Tensor, group: int, power_of_two: bool, dtype: torch.dtype) -> Cost:
    size = gate_up.numel() // 2
    return Cost(nbytes(gate_up) + size + 4 * size // group, 8 * size)


@op(
    fused=True,
    cases=(
        case((1, 256), 128, False, FP8[0]),
        case((3, 400), 128, True, FP8[0]),
        case((2, 1024), 128, False, FP8[1]),
        case((4096, 36864), 128, False, FP8[0], bench=True),
    ),
    tolerance=TOLERANCE,
    cost=_cost,
)
def silu_mul_quant_fp8(
    gate_up: torch.Tensor, group: int, power_of_two: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [T, 2I], the gate first -> (x8 [T, I], scales [T, ceil(I / group)]); see silu_mul and quant_fp8."""
    return quant_fp8(silu_mul(gate_up), group, power_of_two, dtype)
