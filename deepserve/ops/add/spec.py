"""The residual addition."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, nbytes, normal, op


def _case(num_tokens: int, hidden: int, bench: bool = False) -> Case:
    return Case(
        f"T{num_tokens}-H{hidden}",
        lambda generator, dtype, device: (
            normal(generator, (num_tokens, hidden), dtype, device),
            normal(generator, (num_tokens, hidden), dtype, device),
        ),
        bench,
    )


def _cost(x: torch.Tensor, residual: torch.Tensor) -> Cost:
    return Cost(3 * nbytes(x), x.numel())


@op(cases=(_case(3, 100), _case(4096, 7168, True)), cost=_cost)
def add(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x [T, H], residual [T, H] of one dtype -> their sum, rounded once to that dtype."""
    return x + residual
