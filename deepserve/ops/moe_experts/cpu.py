"""Tokens sorted by expert, then one product an expert that is in use. Needs a CPU."""

from __future__ import annotations

import torch

from deepserve.ops.op import Kernel
from deepserve.ops.silu_mul.spec import silu_mul


def function(
    x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """moe_experts."""
    top_k = ids.shape[1]
    chosen, order = ids.flatten().sort(stable=True)
    experts, counts = chosen.unique_consecutive(return_counts=True)
    spans = list(zip(experts.tolist(), counts.tolist()))
    rows = x.index_select(0, order // top_k)
    gate_up = x.new_empty(len(rows), w_gate_up.shape[1])
    start = 0
    for expert, count in spans:
        torch.mm(rows[start : start + count], w_gate_up[expert].T, out=gate_up[start : start + count])
        start += count
    hidden = silu_mul(gate_up)
    start = 0
    for expert, count in spans:
        torch.mm(hidden[start : start + count], w_down[expert].T, out=rows[start : start + count])
        start += count
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    y = rows.index_select(0, back).view(*ids.shape, -1)
    return (y.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


KERNEL = Kernel("moe_experts", "cpu", function)
