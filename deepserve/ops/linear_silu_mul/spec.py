"""silu(x W_gate^T) * (x W_up^T): the two halves of a stacked projection and the gated activation (Shazeer 2020)."""

from __future__ import annotations

import torch

from deepserve.ops.linear.spec import linear
from deepserve.ops.op import Case, Cost, nbytes, normal, op
from deepserve.ops.silu_mul.spec import silu_mul


def _case(rows: int, width: int, inner: int, bench: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        x, weight = (normal(generator, shape, dtype, device) for shape in ((rows, width), (2 * inner, width)))
        return x, weight * width**-0.5

    return Case(f"{rows}x{width}x{inner}", make, bench)


def _cost(x: torch.Tensor, weight: torch.Tensor) -> Cost:
    rows, out = x.shape[0], weight.shape[0]
    return Cost(nbytes(x) + nbytes(weight) + rows * out // 2 * x.element_size(), rows * (2 * weight.numel() + 3 * out))


@op(
    fused=True,
    cases=(_case(1, 64, 96), _case(5, 96, 40), _case(130, 192, 256), _case(32, 2048, 2048, bench=True)),
    tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 2e-2), torch.float16: (4e-3, 3e-3)},
    cost=_cost,
)
def linear_silu_mul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, in], weight [2I, in] (gate rows first) -> [T, I]."""
    return silu_mul(linear(x, weight, None))
