"""Rows of the embedding table."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from deepserve.ops.op import Cost, Ids, case, op


def _cost(token_ids: torch.Tensor, weight: torch.Tensor) -> Cost:
    return Cost(token_ids.numel() * (8 + 2 * weight.shape[1] * weight.element_size()), 0)


@op(
    cases=(
        case(Ids(17, (1,)), (17, 64)),
        case(Ids(33, (9,)), (33, 100)),
        case(Ids(11, (3,)), (11, 2048)),
        case(Ids(50, (300,)), (50, 72)),
        case(Ids(129280, (4096,)), (129280, 1024), bench=True),
        case(Ids(129280, (32768,)), (129280, 1024), bench=True),
    ),
    cost=_cost,
)
def embedding(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """token_ids [T] int64 in [0, V), weight [V, H] -> [T, H] of weight's dtype: a copy of the rows."""
    return F.embedding(token_ids, weight)
