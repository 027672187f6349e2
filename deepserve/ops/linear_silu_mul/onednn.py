"""Two oneDNN products: the gate's applies silu to its sums, the other multiplies its own with the result."""

from __future__ import annotations

import torch

from deepserve.ops.linear import onednn
from deepserve.ops.op import Kernel


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gate's half and the other, packed."""
    return tuple(map(onednn.pack, weight.chunk(2)))


def function(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """linear_silu_mul with packed halves."""
    gate = torch.ops.mkldnn._linear_pointwise(x, weight[0], None, "swish", [], "")
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, gate, weight[1], None, "mul")
    return y


KERNEL = Kernel("linear_silu_mul", "onednn", function, {"weight": pack})
