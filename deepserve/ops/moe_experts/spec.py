"""SwiGLU experts on the tokens routed to them."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.clamp_gate_up.spec import clamp_gate_up
from deepserve.ops.op import Case, Cost, op
from deepserve.ops.silu_mul.spec import silu_mul


def _case(rows: int, experts: int, top_k: int, hidden: int, width: int, limit: float | None = None) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        def normal(*shape: int) -> torch.Tensor:
            if device == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)

        ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(rows)])
        weights = torch.rand(rows, top_k, generator=generator)
        x = torch.randn(rows, hidden, generator=generator).to(device, dtype)
        w_gate_up, w_down = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
        return x, w_gate_up, w_down, weights.to(device), ids.to(device), limit

    name = f"{rows}x{experts}x{top_k}x{hidden}x{width}"
    return Case(name if limit is None else f"{name}-limit", make, bench=hidden >= 1024)


def _cost(
    x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *rest: Any
) -> Cost:
    used = min(ids.numel(), w_gate_up.shape[0])
    expert = w_gate_up[0].numel() + w_down[0].numel()
    return Cost((used * expert + 2 * x.numel()) * x.element_size(), 2 * ids.numel() * expert)


@op(
    cases=(
        _case(1, 8, 3, 64, 32),
        _case(3, 16, 4, 96, 48),
        _case(21, 16, 4, 96, 48),
        _case(70, 6, 2, 64, 40),
        _case(260, 6, 2, 64, 40),
        _case(1, 8, 3, 64, 32, limit=0.5),
        _case(9, 8, 2, 64, 32, limit=0.5),
        _case(32, 16, 4, 1024, 512),
        _case(1, 64, 6, 2048, 1408),
        _case(4, 16, 6, 2048, 1408),
        _case(16, 64, 6, 2048, 1408),
        _case(128, 64, 6, 2048, 1408),
        _case(512, 64, 6, 2048, 1408),
        _case(2048, 16, 6, 2048, 1408),
    ),
    tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 4e-2), torch.float16: (2e-3, 5e-3)},
    cost=_cost,
)
def moe_experts(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    limit: float | None,
) -> torch.Tensor:
    """x [T, H], w_gate_up [E, 2I, H] (gate first), w_down [E, H, I], weights fp32 [T, K], ids int64 [T, K] -> [T, H].

    The sum over a token's experts of weight * down(silu(gate(x)) * up(x)); the sum in fp32, rounded once. With a
    `limit` gate and up are clamped first, as clamp_gate_up does (V4).
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w_gate_up.shape[0]):
        rows, columns = (ids == expert).nonzero(as_tuple=True)
        gate_up = x[rows] @ w_gate_up[expert].T
        y = silu_mul(gate_up if limit is None else clamp_gate_up(gate_up, limit)) @ w_down[expert].T
        out.index_add_(0, rows, y.float() * weights[rows, columns, None])
    return out.to(x.dtype)
