"""x W^T added to the residual stream, and the norm of the sum: what ends every attention and MLP."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.add_rms_norm.spec import add_rms_norm
from deepserve.ops.linear.spec import linear
from deepserve.ops.op import Case, Cost, nbytes, normal, op


def _case(rows: int, width: int, hidden: int, bench: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        shapes = ((rows, width), (hidden, width), (rows, hidden), (hidden,))
        x, weight, residual, norm_weight = (normal(generator, shape, dtype, device) for shape in shapes)
        return x, weight * width**-0.5, residual, norm_weight, 1e-6

    return Case(f"{rows}x{width}x{hidden}", make, bench)


def _cost(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> Cost:
    return Cost(nbytes(x) + nbytes(weight) + 3 * nbytes(residual), x.shape[0] * 2 * weight.numel())


BENCHED = tuple(_case(rows, 2048, 2048, bench=True) for rows in (1, 16, 32))


@op(
    fused=True,
    cases=(_case(1, 64, 96), _case(5, 96, 40), _case(9, 700, 72), _case(130, 192, 256), *BENCHED),
    tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 3e-2), torch.float16: (4e-3, 4e-3)},
    cost=_cost,
)
def linear_add_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in], weight [H, in], residual [T, H], norm_weight [H] -> (normed [T, H], new residual [T, H])."""
    return add_rms_norm(linear(x, weight, None), residual, norm_weight, eps)
