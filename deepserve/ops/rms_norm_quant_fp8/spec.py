"""RMS normalisation and FP8 quantisation in one pass: the input of an FP8 projection."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, nbytes, normal, op
from deepserve.ops.quant_fp8.spec import FP8, TOLERANCE, quant_fp8
from deepserve.ops.rms_norm.spec import rms_norm


def _case(num_tokens: int, hidden: int, power_of_two: bool, dtype8: torch.dtype = FP8[0], bench: bool = False) -> Case:
    form = ("e4m3fn" if dtype8 == FP8[0] else "e4m3fnuz") + "-ue8m0" * power_of_two
    return Case(
        f"T{num_tokens}-H{hidden}-{form}",
        lambda generator, dtype, device: (
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
    x: torch.Tensor, weight: torch.Tensor, eps: float, group: int, power_of_two: bool, dtype: torch.dtype
) -> Cost:
    return Cost(nbytes(x, weight) + x.numel() + 4 * x.numel() // group, 7 * x.numel())


@op(
    fused=True,
    cases=(
        _case(1, 128, False),
        _case(3, 1536, True),
        _case(2, 512, False, FP8[1]),
        _case(4096, 7168, False, bench=True),
    ),
    tolerance=TOLERANCE,
    cost=_cost,
)
def rms_norm_quant_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, group: int, power_of_two: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H], weight [H] -> (x8 [T, H], scales [T, H / group]) of the normalised rows; see rms_norm and quant_fp8."""
    return quant_fp8(rms_norm(x, weight, eps), group, power_of_two, dtype)
