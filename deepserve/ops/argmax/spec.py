"""The most likely token of each row."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, case, integers, nbytes, op


def _ties(num_rows: int, vocab_size: int) -> Case:
    return Case(
        f"S{num_rows}-V{vocab_size}-ties",
        lambda generator, dtype, device: (integers(generator, 3, (num_rows, vocab_size), device).to(dtype),),
    )


def _cost(logits: torch.Tensor) -> Cost:
    return Cost(nbytes(logits) + 8 * len(logits), logits.numel())


@op(
    cases=(case((1, 64)), case((3, 5000)), _ties(4, 9001), case((256, 129280), bench=True)),
    dtypes=(torch.float32,),
    cost=_cost,
)
def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [S, V] fp32, no NaN -> [S] int64: the index of each row's largest value, the lowest one among equals."""
    return logits.argmax(-1)
