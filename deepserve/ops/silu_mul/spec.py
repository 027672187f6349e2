"""The gated activation of SwiGLU (Shazeer 2020)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from deepserve.ops.op import Cost, case, nbytes, op


def _cost(gate_up: torch.Tensor) -> Cost:
    return Cost(nbytes(gate_up) * 3 // 2, gate_up.numel() * 5 // 2)


@op(
    cases=(case((1, 64)), case((5, 200)), case((3, 4096)), case((4096, 36864), bench=True)),
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (1e-3, 1e-6), torch.bfloat16: (8e-3, 1e-6)},
    cost=_cost,
)
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I], the gate first -> silu(gate) * up [T, I], evaluated in fp32 and rounded once."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)
