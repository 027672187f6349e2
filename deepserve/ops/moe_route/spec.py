"""Routers of V2 (softmax), V3 (sigmoid with a bias), V4 (sqrt of softplus with a bias) and Mixtral/Qwen3 (softmax)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from deepserve.ops.op import Case, Cost, op


def _case(name: str, rows: int, experts: int, *rest: Any, bias: bool = False, bench: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        logits = torch.randn(rows, experts, generator=generator)
        shift = torch.randn(experts, generator=generator).mul(0.1) if bias else None
        if bench:  # of so many rows some would be near-ties, which rounding decides: all scores are some way apart
            logits = logits.argsort(1) * (4 / experts) - 2
            shift = torch.full((experts,), 0.25) if bias else None
        return logits.to(device), None if shift is None else shift.to(device), *rest

    return Case(name, make, bench)


def _cost(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *rest: Any) -> Cost:
    return Cost(4 * logits.numel() + 12 * logits.shape[0] * top_k, 5 * logits.numel())


def scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """fp32 [T, E]: softmax over the experts, sigmoid, or sqrtsoftplus = sqrt(ln(1 + e^x))."""
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else F.softplus(logits).sqrt()


@op(
    cases=(
        _case("v2_lite", 5, 64, 6, 1, 1, "softmax", "greedy", False, 1.0),
        _case("v2", 9, 160, 6, 8, 3, "softmax", "group_max", False, 16.0),
        _case("v3", 33, 256, 8, 8, 4, "sigmoid", "group_top2", True, 2.5, bias=True),
        _case("v4", 33, 256, 6, 1, 1, "sqrtsoftplus", "greedy", True, 1.5, bias=True),
        _case("mixtral", 7, 8, 2, 1, 1, "softmax", "greedy", True, 1.0),
        _case("v3_4096", 4096, 256, 8, 8, 4, "sigmoid", "group_top2", True, 2.5, bias=True, bench=True),
        _case("v3_32768", 32768, 256, 8, 8, 4, "sigmoid", "group_top2", True, 2.5, bias=True, bench=True),
    ),
    tolerance={torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-5, 1e-6), torch.float16: (1e-5, 1e-6)},
    cost=_cost,
)
def moe_route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    scoring: str,
    selection: str,
    renormalize: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 [T, E], bias fp32 [E] or None -> (weights fp32 [T, K], expert ids int64 [T, K]), best first.

    Scores + bias choose, the scores alone weigh (see `scores`). `selection` greedy takes
    the best K; group_max and group_top2 first keep the top_k_groups groups of E / num_groups neighbours that have the
    largest maximum, or sum of their two largest, and choose within them. Then weights are divided by their sum
    (renormalize) and multiplied by `factor`.
    """
    score = scores(logits, scoring)
    choice = score if bias is None else score + bias
    if selection != "greedy":
        groups = choice.unflatten(1, (num_groups, -1))
        rank = groups.amax(-1) if selection == "group_max" else groups.topk(2, dim=-1).values.sum(-1)
        dropped = torch.ones_like(rank, dtype=torch.bool).scatter_(1, rank.topk(top_k_groups, dim=1).indices, False)
        choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    ids = choice.topk(top_k, dim=1).indices
    weights = score.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * factor, ids
