"""oneDNN with the weight laid out once for the CPU at hand. Needs a CPU; packed weights are opaque tensors."""

from __future__ import annotations

import torch

from deepserve.ops.op import Kernel

# The layout is chosen for about this many rows: decoding is where a CPU reads whole weights for a few tokens.
PACKED_FOR_ROWS = 32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] in oneDNN's blocked layout (opaque; only onednn's function can read it)."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS)
    return packed


def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """linear with a packed weight."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


KERNEL = Kernel("linear", "onednn", function, {"weight": pack})
