"""Residual addition and RMS normalisation in one pass: the residual stream is read and written once."""

from __future__ import annotations

import torch

from deepserve.ops.add.spec import add
from deepserve.ops.op import Cost, case, nbytes, op
from deepserve.ops.rms_norm.spec import TOLERANCE, rms_norm


def _cost(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    return Cost(4 * nbytes(x) + nbytes(weight), 5 * x.numel())


@op(
    fused=True,
    cases=(
        case((1, 64), (1, 64), (64,), 1e-6),
        case((5, 100), (5, 100), (100,), 1e-6),
        case((3, 7168), (3, 7168), (7168,), 1e-6),
        case((4096, 7168), (4096, 7168), (7168,), 1e-6, bench=True),
    ),
    tolerance=TOLERANCE,
    cost=_cost,
)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H], residual [T, H], weight [H] -> (normed [T, H], new residual [T, H]).

    The sum is rounded to the dtype before it is normalised, so fused and separate differ in nothing but speed.
    """
    residual = add(x, residual)
    return rms_norm(residual, weight, eps), residual
