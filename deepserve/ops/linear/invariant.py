"""linear that is the same bits whatever the batch: one instruction's order of summing, whatever the tiles."""

from __future__ import annotations

import torch

from deepserve.ops.launch import chip
from deepserve.ops.linear.product import product
from deepserve.ops.op import Kernel

FEW_ROWS, SOME_ROWS = 32, 1024


def tile_of(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Columns, rows, channels, warps and stages. At least 32 rows: AMD's instructions of 16 sum in another order."""
    is_amd, num_rows = chip(x.device).is_amd, len(x)
    if x.element_size() > 2:
        return 32, 32, 32, 4, 1
    if num_rows <= FEW_ROWS:
        return 64, 32, 128, 4, 2 if is_amd else 4
    if num_rows <= SOME_ROWS or is_amd:
        return 64, 128, 64, 4, 2 if is_amd else 4
    return 128, 128, 64, 8, 4


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See spec.py. weight is contiguous."""
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    return product(x, weight, bias, out, tile_of(x))


KERNEL = Kernel("linear", "invariant", linear)
