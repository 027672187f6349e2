"""head_matmul that is the same bits whatever the batch."""

from __future__ import annotations

import torch

from deepserve.ops.linear.invariant import tile_of
from deepserve.ops.linear.product import product
from deepserve.ops.op import Kernel


def head_matmul(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See spec.py. weight is contiguous."""
    if out is None:
        out = torch.empty((len(hidden), len(weight)), dtype=torch.float32, device=hidden.device)
    return product(hidden, weight, None, out, tile_of(hidden))


KERNEL = Kernel("head_matmul", "invariant", head_matmul)
