"""SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from deepserve.layers.linear import Maker
from deepserve.layers.slot import Slot
from deepserve.ops.silu_mul.spec import silu_mul


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, make: Maker, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = make.linear(hidden_size, parts, bias)
        self.down = make.linear(intermediate_size, {"down_proj": hidden_size}, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(silu_mul(self.gate_up(x)))

    def slots(self, prefix: str) -> Iterator[Slot]:
        """Where the tensors under `prefix` go."""
        yield from self.gate_up.slots(prefix)
        yield from self.down.slots(prefix)
