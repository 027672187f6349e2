"""moe_route in Triton: scores, groups and the K best of each row in registers, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.fp32_order import key_of
from deepserve.ops.launch import next_power_of_two
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

TILE = 256  # elements of a program, which is one warp: reductions stay within it
TAKEN = tl.constexpr(-(2**31))  # the key of an expert that is taken, or none: below that of any number


@triton.jit
def _logits_at(logits, row, expert, mask, num_rows, row_stride, PARTS: tl.constexpr):
    """The parts' sums; -inf where there is no expert."""
    total = tl.load(logits + row * row_stride + expert, mask, float("-inf"))
    for part in tl.static_range(1, PARTS):
        total += tl.load(logits + (part * num_rows + row) * row_stride + expert, mask, 0.0)
    return total


@triton.jit
def _scores_of(logits, largest, total, SCORING: tl.constexpr):
    """Of softmax: `largest` and `total` are those of the whole row."""
    if SCORING == "softmax":
        return tl.exp(logits - largest) / total
    elif SCORING == "sigmoid":
        return tl.sigmoid(logits)
    else:
        return tl.sqrt(tl.maximum(logits, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(logits))))


@triton.jit(do_not_specialize=["num_rows"])
def _moe_route_kernel(
    logits,  # [PARTS, T, GROUPS * SIZE], to be summed over the first
    bias,  # [GROUPS * SIZE] or None
    weights,  # [T, TOP_K]
    ids,
    factor,
    num_rows,
    row_stride,
    PARTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,  # 0: all of them
    TOP_2: tl.constexpr,  # a group's rank is the sum of its two largest, not its largest
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    TOP_K_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, GROUPS_BLOCK * SIZE_BLOCK)[None, :]
    group, place = lane // SIZE_BLOCK, lane % SIZE_BLOCK
    expert = group * SIZE + place
    real = (group < GROUPS) & (place < SIZE)
    source = tl.minimum(row, num_rows - 1)[:, None]  # rows that are none must be finite too
    row_logits = _logits_at(logits, source, expert, real, num_rows, row_stride, PARTS)
    largest = tl.max(row_logits, 1, keep_dims=True)
    total = tl.sum(tl.exp(row_logits - largest), 1, keep_dims=True)
    choice = _scores_of(row_logits, largest, total, SCORING)
    if bias is not None:
        choice = choice + tl.load(bias + expert, real, 0.0)
    choice = tl.where(real, choice, float("-inf"))
    if TOP_K_GROUPS > 0:
        grouped = tl.reshape(choice, (ROWS, GROUPS_BLOCK, SIZE_BLOCK))
        rank, best = tl.max(grouped, 2, return_indices=True)
        if TOP_2:
            within = tl.arange(0, SIZE_BLOCK)[None, None, :]
            rank += tl.max(tl.where(within == best[:, :, None], float("-inf"), grouped), 2)
        which = tl.arange(0, GROUPS_BLOCK)
        ahead = (which[None, None, :] < which[None, :, None]) & (rank[:, None, :] == rank[:, :, None])
        better = tl.sum((ahead | (rank[:, None, :] > rank[:, :, None])).to(tl.int32), 2)
        grouped = tl.where(better[:, :, None] < TOP_K_GROUPS, grouped, float("-inf"))
        choice = tl.reshape(grouped, (ROWS, GROUPS_BLOCK * SIZE_BLOCK))
    column = tl.arange(0, TOP_K_BLOCK)[None, :]
    found = tl.zeros((ROWS, TOP_K_BLOCK), tl.int32)
    keys = tl.where(real, key_of(choice), TAKEN)  # integers: a warp finds their largest, and a place, in one step each
    for k in tl.static_range(TOP_K):
        first = tl.where(keys == tl.max(keys, 1, keep_dims=True), lane, GROUPS_BLOCK * SIZE_BLOCK)
        first = tl.min(first, 1, keep_dims=True)
        found = tl.where(column == k, first, found)
        keys = tl.where(lane == first, TAKEN, keys)
    found = found // SIZE_BLOCK * SIZE + found % SIZE_BLOCK
    # The scores of those found, once more: cheaper than to look for each among all.
    mask = column < TOP_K
    taken = _logits_at(logits, source, found, mask, num_rows, row_stride, PARTS)
    taken = tl.where(mask, _scores_of(taken, largest, total, SCORING), 0.0)
    if RENORMALIZE:
        taken = taken / (tl.sum(taken, 1, keep_dims=True) + 1e-20)
    out = row[:, None] * TOP_K + column
    mask &= (row < num_rows)[:, None]
    tl.store(weights + out, taken * factor, mask)
    tl.store(ids + out, found.to(tl.int64), mask)


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
    """See spec.py."""
    return route(logits[None], bias, top_k, num_groups, top_k_groups, scoring, selection, renormalize, factor)


def route(
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
    """moe_route of logits that are still to be summed over their first dimension, [parts, T, E]."""
    parts, num_rows, num_experts = logits.shape
    groups = 1 if selection == "greedy" else num_groups
    size = num_experts // groups
    lanes = next_power_of_two(groups) * next_power_of_two(size)
    rows = max(TILE // lanes, 1)  # however few there are: how lanes share a row, and so its sums, hangs on it
    weights = torch.empty((num_rows, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, top_k), dtype=torch.int64, device=logits.device)
    _moe_route_kernel[(triton.cdiv(num_rows, rows),)](
        logits, bias, weights, ids, float(factor), num_rows, logits.stride(1), parts, top_k,
        0 if selection == "greedy" else top_k_groups, selection == "group_top2", scoring, renormalize, groups,
        size, rows, next_power_of_two(groups), next_power_of_two(size), next_power_of_two(top_k),
        num_warps=1, **overlap(logits.device),
    )  # fmt: skip
    return weights, ids


KERNEL = Kernel("moe_route", "triton", moe_route)
