"""The gated activation of SwiGLU (Shazeer 2020)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from deepserve.ops.op import Case, Cost, nbytes, normal, op


def _case(num_tokens: int, size: int, bench: bool = False) -> Case:
    return Case(
        f"T{num_tokens}-I{size}",
        lambda generator, dtype, device: (normal(generator, (num_tokens, 2 * size), dtype, device),),
        bench,
    )


def _cost(gate_up: torch.Tensor) -> Cost:
    return Cost(nbytes(gate_up) * 3 // 2, gate_up.numel() * 5 // 2)


@op(
    cases=(_case(1, 32), _case(5, 100), _case(3, 2048), _case(4096, 18432, True)),
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (1e-3, 1e-6), torch.bfloat16: (8e-3, 1e-6)},
    cost=_cost,
)
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I], the gate first -> silu(gate) * up [T, I], evaluated in fp32 and rounded once."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)
