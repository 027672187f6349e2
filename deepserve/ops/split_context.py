"""What Triton's decode attention shares: a context in parts that several programs attend to, and their combination."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from deepserve.kv_cache.spec import FIXED_BYTES
from deepserve.ops.launch import chip, next_power_of_two
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.paged import single_rows
from deepserve.runner.batch import Batch

HEADS = 16  # of one decode program: the narrowest tile that matrix instructions take
MAX_SPLITS = 64
SPLITS_AT_ONCE = 8  # that a program combines in one go
FIXED_SPLITS = 8  # of every context, where results may not depend on the batch
LOG2_E = 1.4426950408889634


def num_splits(num_programs: int, shared_bytes: int, device: torch.device) -> int:
    """Into how many parts each program's context is split: as many as a chip holds programs of so much shared memory,
    whatever the lengths, so that a step of few requests is the same launch at any context; programs of empty parts end
    at once.
    """
    found = chip(device)
    at_once = 2 if 2 * shared_bytes <= found.shared_bytes else 1
    return min(max(at_once * found.num_multiprocessors // num_programs, 1), MAX_SPLITS)


def fixed_rows(batch: Batch, heads: int, size: int) -> Iterator[tuple[slice, Batch]]:
    """(which of the batch's tokens, a batch of them, each a row of its own), in order, as many at a time as FIXED_BYTES
    hold the parts of, with `size` channels a head."""
    rows, at_once = single_rows(batch), max(FIXED_BYTES // (4 * FIXED_SPLITS * heads * size), 1)
    for start in range(0, len(rows.seq_lens), at_once):
        some = slice(start, start + at_once)
        yield some, replace(rows, block_table=rows.block_table[some], seq_lens=rows.seq_lens[some], derived={})


@triton.jit
def part_of(seq_len, split, splits, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """(first, last) token of a part of the last WINDOW tokens (None: all); no part is empty but the last ones."""
    start = 0
    if WINDOW is not None:
        start = tl.maximum(seq_len - WINDOW, 0)
    part = tl.cdiv(tl.cdiv(seq_len - start, splits), KEYS) * KEYS
    first = start + split * part
    return first, tl.minimum(first + part, seq_len)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    mixed,  # fp32 [B, num_heads, splits, SIZE]
    log_sums,  # fp32 [B, num_heads, splits]: log2 of each part's sum of exponentials
    seq_lens,
    out,  # [B, num_heads, SIZE] at strides out_row, out_head, 1
    out_row,
    out_head,
    splits,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,  # at a time
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = (request * tl.num_programs(1) + head) * splits
    seq_len = tl.load(seq_lens + request)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        first, last = part_of(seq_len, split, splits, KEYS, WINDOW)
        used = (split < splits) & (first < last)
        logs = tl.load(log_sums + row + split, used, float("-inf"))
        top = tl.maximum(largest, tl.max(logs, 0))
        share = tl.exp2(logs - top)
        shrink = tl.exp2(largest - top)
        mask = used[:, None] & (channel[None, :] < SIZE)
        parts = tl.load(mixed + (row + split[:, None]) * SIZE + channel[None, :], mask, 0.0)
        total = total * shrink + tl.sum(share, 0)
        value = value * shrink + tl.sum(parts * share[:, None], 0)
        largest = top
    value = (value / total).to(out.dtype.element_ty)
    tl.store(out + request * out_row + head * out_head + channel, value, channel < SIZE)


def combine(
    mixed: torch.Tensor,
    log_sums: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    keys: int,
    window: int | None,
    is_fixed: bool,
) -> None:
    """mixed fp32 [B, N, splits, D], log_sums fp32 [B, N, splits] of part_of's parts -> out [B, N, D], any strides.

    is_fixed: parts are added up in the same order however many rows there are.
    """
    requests, heads, splits, size = mixed.shape
    few = not is_fixed and requests * heads < chip(mixed.device).num_multiprocessors
    block = min(next_power_of_two(size), 128 if few else 512)
    _combine_kernel[(requests, heads, triton.cdiv(size, block))](
        mixed, log_sums, seq_lens, out, out.stride(0), out.stride(1), splits, size, block, keys, window, SPLITS_AT_ONCE,
        num_warps=4, **overlap(mixed.device),
    )  # fmt: skip
