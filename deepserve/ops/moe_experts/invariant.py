"""Experts that are the same bits whatever the batch: the same tile for any number of rows."""

from __future__ import annotations

import torch

from deepserve.ops.launch import chip
from deepserve.ops.moe_experts.triton import Tiles, expert_rows, weigh_and_sum
from deepserve.ops.op import Kernel

# Of 64 rows: the fewest that Hopper's matrix instructions take, of which others sum in another order.
WIDE = Tiles(64, (32, 32, 4, 2, 0), (32, 32, 4, 2, 0))  # fp32
AMD = Tiles(64, (32, 128, 4, 2, 0), (64, 128, 4, 2, 0))
NVIDIA = Tiles(64, (64, 64, 4, 4, 0), (128, 64, 4, 4, 0))


def moe_experts(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    limit: float | None,
) -> torch.Tensor:
    """See spec.py."""
    tiles = WIDE if x.element_size() > 2 else AMD if chip(x.device).is_amd else NVIDIA
    return weigh_and_sum(expert_rows(x, (w_gate_up, w_down), ids, limit, tiles=tiles), weights)


KERNEL = Kernel("moe_experts", "invariant", moe_experts)
