"""The second half of a layer, its router included (DeepSeekMoE, Dai et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.linear_moe_route.spec import linear_moe_route
from deepserve.ops.moe_experts_add_rms_norm.spec import moe_experts_add_rms_norm
from deepserve.ops.op import Case, Cost, op

ROUTING = (1, 1, "softmax", "greedy", False, 1.0)  # num_groups, top_k_groups, scoring, selection, renormalize, factor


def _case(rows: int, experts: int, top_k: int, hidden: int, width: int, shared: int, bench: bool = False) -> Case:
    """Few rows: where two experts are nearly as good as one another, sums in another order choose the other one."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
            if device == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        router = normal(experts, hidden, scale=hidden**-0.5, dtype=torch.float32)
        matrices = (
            normal(experts, 2 * width, hidden, scale=hidden**-0.5),
            normal(experts, hidden, width, scale=width**-0.5),
        )
        shared_gate_up = normal(2 * shared * width, hidden, scale=hidden**-0.5)
        shared_down = normal(hidden, shared * width, scale=(shared * width) ** -0.5)
        gain = torch.ones(hidden, dtype=dtype, device=device)
        return (
            normal(rows, hidden), router, None, top_k, *ROUTING, *matrices, None, shared_gate_up, shared_down,
            normal(rows, hidden), gain, 1e-6,
        )  # fmt: skip

    return Case(f"{rows}x{experts}x{top_k}x{hidden}x{width}x{shared}", make, bench)


def _cost(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int, *rest: Any) -> Cost:
    w_gate_up, w_down, _, shared_gate_up, shared_down, *_ = rest[6:]
    used = min(len(x) * top_k, len(w_gate_up))
    expert, shared = w_gate_up[0].numel() + w_down[0].numel(), shared_gate_up.numel() + shared_down.numel()
    moved = (used * expert + shared + 4 * x.numel()) * x.element_size() + 4 * weight.numel()
    return Cost(moved, 2 * len(x) * (weight.numel() + top_k * expert + shared))


@op(
    fused=True,
    cases=(
        _case(1, 8, 3, 64, 32, 1),
        _case(5, 16, 4, 96, 48, 2),
        _case(40, 6, 2, 64, 40, 2),
        _case(1, 64, 6, 2048, 1408, 2, bench=True),
        _case(16, 64, 6, 2048, 1408, 2, bench=True),
    ),
    tolerance={torch.float32: (1e-5, 2e-5), torch.bfloat16: (3e-2, 5e-2), torch.float16: (4e-3, 6e-3)},
    cost=_cost,
)
def linear_moe_experts_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    scoring: str,
    selection: str,
    renormalize: bool,
    factor: float,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    limit: float | None,
    shared_gate_up: torch.Tensor,
    shared_down: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear_moe_route's arguments, then moe_experts_add_rms_norm's without what the router gives ->
    (normed [T, H], new residual [T, H])."""
    weights, ids = linear_moe_route(
        x, weight, bias, top_k, num_groups, top_k_groups, scoring, selection, renormalize, factor
    )
    return moe_experts_add_rms_norm(
        x, w_gate_up, w_down, weights, ids, limit, shared_gate_up, shared_down, residual, norm_weight, eps
    )
