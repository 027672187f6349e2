"""Logits: fp32 out, whatever the model computes in."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, op


def _case(rows: int, width: int, out: int, bench: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, width, generator=generator)
        weight = torch.randn(out, width, generator=generator) * width**-0.5
        return x.to(device, dtype), weight.to(device, dtype)

    return Case(f"{rows}x{width}x{out}", make, bench)


def _cost(hidden: torch.Tensor, weight: torch.Tensor) -> Cost:
    rows = hidden.shape[0]
    moved = (hidden.numel() + weight.numel()) * hidden.element_size() + 4 * rows * weight.shape[0]
    return Cost(moved, 2 * rows * weight.numel())


@op(
    cases=(
        _case(1, 64, 320),
        _case(7, 96, 333),
        _case(70, 96, 130),
        _case(1, 2048, 102400, bench=True),
        _case(32, 2048, 32768, bench=True),
    ),
    tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 2e-3)},
    cost=_cost,
)
def head_matmul(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [S, H], weight [V, H] -> logits fp32 [S, V], summed in fp32 and not rounded to the weight's dtype."""
    return hidden.float() @ weight.float().T
