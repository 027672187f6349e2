"""Residual addition and RMS normalisation in one pass: the residual stream is read and written once."""

from __future__ import annotations

import torch

from deepserve.ops.add.spec import add
from deepserve.ops.op import Case, Cost, nbytes, normal, op
from deepserve.ops.rms_norm.spec import TOLERANCE, rms_norm


def _case(num_tokens: int, hidden: int, bench: bool = False) -> Case:
    return Case(
        f"T{num_tokens}-H{hidden}",
        lambda generator, dtype, device: (
            normal(generator, (num_tokens, hidden), dtype, device),
            normal(generator, (num_tokens, hidden), dtype, device),
            normal(generator, (hidden,), dtype, device),
            1e-6,
        ),
        bench,
    )


def _cost(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    return Cost(4 * nbytes(x) + nbytes(weight), 5 * x.numel())


@op(
    fused=True,
    cases=(_case(1, 64), _case(5, 100), _case(3, 7168), _case(4096, 7168, True)),
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
