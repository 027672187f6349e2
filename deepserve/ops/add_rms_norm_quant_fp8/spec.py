"""Residual addition, RMS normalisation and FP8 quantisation in one pass."""

from __future__ import annotations

import torch

from deepserve.ops.add_rms_norm.spec import add_rms_norm
from deepserve.ops.op import Case, Cost, nbytes, normal, op
from deepserve.ops.quant_fp8.spec import FP8, quant_fp8
from deepserve.ops.quant_fp8.spec import TOLERANCE as QUANT_TOLERANCE


def _case(num_tokens: int, hidden: int, power_of_two: bool, dtype8: torch.dtype = FP8[0], bench: bool = False) -> Case:
    form = ("e4m3fn" if dtype8 == FP8[0] else "e4m3fnuz") + "-ue8m0" * power_of_two
    return Case(
        f"T{num_tokens}-H{hidden}-{form}",
        lambda generator, dtype, device: (
            normal(generator, (num_tokens, hidden), dtype, device),
            normal(generator, (num_tokens, hidden), dtype, device),
            normal(generator, (hidden,), dtype, device),
            1e-6,
            128,
            power_of_two,
            dtype8,
        ),
        bench,
    )


def _cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int,
    power_of_two: bool,
    dtype: torch.dtype,
) -> Cost:
    return Cost(3 * nbytes(x) + nbytes(weight) + x.numel() + 4 * x.numel() // group, 8 * x.numel())


@op(
    fused=True,
    cases=(
        _case(1, 128, False),
        _case(3, 1536, True),
        _case(2, 512, False, FP8[1]),
        _case(4096, 7168, False, bench=True),
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
