"""Rows of the embedding table."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from deepserve.ops.op import Case, Cost, integers, normal, op


def _case(num_tokens: int, vocab_size: int, hidden: int, bench: bool = False) -> Case:
    return Case(
        f"T{num_tokens}-V{vocab_size}-H{hidden}",
        lambda generator, dtype, device: (
            integers(generator, vocab_size, (num_tokens,), device),
            normal(generator, (vocab_size, hidden), dtype, device),
        ),
        bench,
    )


def _cost(token_ids: torch.Tensor, weight: torch.Tensor) -> Cost:
    return Cost(token_ids.numel() * (8 + 2 * weight.shape[1] * weight.element_size()), 0)


@op(cases=(_case(1, 17, 64), _case(9, 33, 100), _case(3, 11, 2048), _case(4096, 129280, 1024, True)), cost=_cost)
def embedding(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """token_ids [T] int64 in [0, V), weight [V, H] -> [T, H] of weight's dtype: a copy of the rows."""
    return F.embedding(token_ids, weight)
