"""x W^T + b."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, op


def _case(rows: int, width: int, out: int, bias: bool, bench: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[torch.Tensor | None, ...]:
        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        return normal(rows, width), normal(out, width, scale=width**-0.5), normal(out) if bias else None

    return Case(f"{rows}x{width}x{out}{'_bias' if bias else ''}", make, bench)


def _cost(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Cost:
    rows, out = x.shape[0], weight.shape[0]
    return Cost((x.numel() + weight.numel() + rows * out) * x.element_size(), 2 * rows * weight.numel())


@op(
    cases=(
        _case(1, 64, 96, False),
        _case(5, 96, 33, True),
        _case(130, 192, 256, False),
        _case(1, 2304, 50, True),
        _case(1, 2048, 3648, False, bench=True),
        _case(32, 2048, 2048, False, bench=True),
        _case(8192, 2048, 3648, False, bench=True),
    ),
    tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (2e-3, 2e-3)},
    cost=_cost,
)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, in], weight [out, in], bias [out] or None, one dtype -> [T, out]; sums in fp32, rounded once."""
    return torch.nn.functional.linear(x, weight, bias)
