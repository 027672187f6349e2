"""The most likely token of each row, and its logit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepserve.ops.op import Case, Cost, case, integers, nbytes, normal, op


def _case(kind: str, num_rows: int, vocab_size: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    return Case(
        f"S{num_rows}-V{vocab_size}-{kind}",
        lambda generator, dtype, device: (change(normal(generator, (num_rows, vocab_size), dtype, device)),),
    )


def _ties(num_rows: int, vocab_size: int) -> Case:
    return Case(
        f"S{num_rows}-V{vocab_size}-ties",
        lambda generator, dtype, device: (integers(generator, 3, (num_rows, vocab_size), device).to(dtype),),
    )


def _broken(logits: torch.Tensor) -> torch.Tensor:
    logits[0], logits[1, 7], logits[2, 9], logits[3, 1:] = -torch.inf, torch.nan, torch.inf, torch.nan
    return logits


def _cost(logits: torch.Tensor) -> Cost:
    return Cost(nbytes(logits) + 12 * len(logits), logits.numel())


@op(
    cases=(
        case((1, 64)),
        case((3, 5000)),
        _ties(4, 9001),
        _case("zeros", 4, 100, lambda logits: logits.mul_(0.0)),
        _case("broken", 4, 9001, _broken),
        case((256, 129280), bench=True),
    ),
    dtypes=(torch.float32,),
    cost=_cost,
)
def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [S, V] fp32 -> (token ids [S] int64, their logits [S] fp32): each row's largest value, the first of equal
    ones. NaN counts as the largest: a row that has one shows it.
    """
    values, tokens = logits.max(-1)
    return tokens, values
