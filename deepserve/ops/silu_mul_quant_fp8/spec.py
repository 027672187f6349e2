"""Gated activation and FP8 quantisation in one pass: the input of an FP8 down projection."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, nbytes, normal, op
from deepserve.ops.quant_fp8.spec import FP8, TOLERANCE, quant_fp8
from deepserve.ops.silu_mul.spec import silu_mul


def _case(num_tokens: int, size: int, power_of_two: bool, dtype8: torch.dtype = FP8[0], bench: bool = False) -> Case:
    form = ("e4m3fn" if dtype8 == FP8[0] else "e4m3fnuz") + "-ue8m0" * power_of_two
    return Case(
        f"T{num_tokens}-I{size}-{form}",
        lambda generator, dtype, device: (
            normal(generator, (num_tokens, 2 * size), dtype, device),
            128,
            power_of_two,
            dtype8,
        ),
        bench,
    )


def _cost(gate_up: torch.Tensor, group: int, power_of_two: bool, dtype: torch.dtype) -> Cost:
    size = gate_up.numel() // 2
    return Cost(nbytes(gate_up) + size + 4 * size // group, 8 * size)


@op(
    fused=True,
    cases=(
        _case(1, 128, False),
        _case(3, 200, True),
        _case(2, 512, False, FP8[1]),
        _case(4096, 18432, False, bench=True),
    ),
    tolerance=TOLERANCE,
    cost=_cost,
)
def silu_mul_quant_fp8(
    gate_up: torch.Tensor, group: int, power_of_two: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [T, 2I], the gate first -> (x8 [T, I], scales [T, ceil(I / group)]); see silu_mul and quant_fp8."""
    return quant_fp8(silu_mul(gate_up), group, power_of_two, dtype)
