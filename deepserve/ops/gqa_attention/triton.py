"""Grouped-query attention in Triton: one-token rows split over the context, long rows a tile of queries a program.

Keys and values are read where they lie in the paged cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.gqa_attention.tiles import DECODE, PREFILL
from deepserve.ops.launch import chip, next_power_of_two
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.split_context import HEADS, LOG2_E, combine, num_splits, part_of
from deepserve.runner.batch import Batch


@triton.jit(do_not_specialize=["table_row"])
def _gqa_decode_kernel(
    q,  # [B, N, DIM] at strides q_row, q_head, 1
    cache,  # [num_blocks, 2, BLOCK_SIZE, KV_HEADS, DIM]
    block_table,  # [B, *] at row stride table_row
    seq_lens,
    mixed,  # fp32 [B, N, splits, DIM]; with WHOLE the result itself, [B, N, DIM]
    log_sums,  # fp32 [B, N, splits]
    scale_log2,
    q_row,
    q_head,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a K/V head
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,  # there is one part, which is the context
    OVERLAP: tl.constexpr,
):
    """Scores and sums are kept transposed, [keys, heads] and [channels, heads]: the cache is what fills the tiles.

    Block ids are read a tile ahead, so that the copies of keys and values wait for nothing.
    """
    wait(OVERLAP)
    request = tl.program_id(0).to(tl.int64)
    kv_head, block = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    split, splits = tl.program_id(2), tl.num_programs(2)
    first, last = part_of(tl.load(seq_lens + request), split, splits, KEYS, WINDOW)
    if first >= last:
        return
    member = block * HEADS + tl.arange(0, HEADS)
    is_head = member < GROUP
    head = kv_head * GROUP + member
    channel = tl.arange(0, DIM_BLOCK)
    is_channel = channel < DIM
    query = tl.load(
        q + request * q_row + head[None, :] * q_head + channel[:, None], is_channel[:, None] & is_head[None, :], 0.0
    )
    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([DIM_BLOCK, HEADS], tl.float32)
    table = block_table + request * table_row
    place = tl.arange(0, KEYS)
    block_id = tl.load(table + (first + place) // BLOCK_SIZE, first + place < last, 0)
    for start in range(first, last, KEYS):
        token = start + place
        seen = token < last
        slot = block_id.to(tl.int64) * (2 * BLOCK_SIZE) + token % BLOCK_SIZE
        block_id = tl.load(table + (token + KEYS) // BLOCK_SIZE, token + KEYS < last, 0)
        mask = seen[:, None] & is_channel[None, :]
        entry = cache + (slot * KV_HEADS + kv_head)[:, None] * DIM + channel[None, :]
        key = tl.load(entry, mask, 0.0)
        value = tl.load(entry + BLOCK_SIZE * KV_HEADS * DIM, mask, 0.0)
        scores = tl.dot(key, query, input_precision="ieee")
        scores = tl.where(seen[:, None], scores * scale_log2, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - top[None, :])
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.sum(weights, 0)
        sums = tl.dot(tl.trans(value), weights.to(value.dtype), sums * shrink[None, :], input_precision="ieee")
        largest = top
    sums = sums / total[None, :]
    if WHOLE:
        out = mixed + (request * (KV_HEADS * GROUP) + head)[None, :] * DIM + channel[:, None]
        tl.store(out, sums.to(mixed.dtype.element_ty), is_channel[:, None] & is_head[None, :])
    else:
        row = (request * (KV_HEADS * GROUP) + head) * splits + split
        tl.store(mixed + row[None, :] * DIM + channel[:, None], sums, is_channel[:, None] & is_head[None, :])
        tl.store(log_sums + row, largest + tl.log2(total), is_head)


@triton.jit(do_not_specialize=["table_row", "first_request"])
def _gqa_prefill_kernel(
    q,  # [T, N, DIM] at strides q_row, q_head, 1
    cache,
    block_table,
    query_start,  # [B + 1]
    seq_lens,
    out,  # [T, N, DIM]
    scale_log2,
    q_row,
    q_head,
    table_row,
    first_request,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    head, request = tl.program_id(0), first_request + tl.program_id(1)
    begin = (tl.num_programs(2) - 1 - tl.program_id(2)) * ROWS  # the longest first, of all heads and requests
    query_begin = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - query_begin
    if begin >= query_len:
        return
    context_len = tl.load(seq_lens + request)
    row = begin + tl.arange(0, ROWS)
    is_row = row < query_len
    channel = tl.arange(0, DIM_BLOCK)
    is_channel = channel < DIM
    token = (query_begin + row).to(tl.int64)[:, None]
    mask = is_row[:, None] & is_channel[None, :]
    query = tl.load(q + token * q_row + head * q_head + channel[None, :], mask, 0.0)
    position = context_len - query_len + row  # of each query in its context
    last = tl.minimum(context_len - query_len + begin + ROWS, context_len)
    first = 0
    if WINDOW is not None:
        first = tl.maximum(context_len - query_len + begin - WINDOW + 1, 0) // KEYS * KEYS
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    table = block_table + request.to(tl.int64) * table_row
    for start in range(first, last, KEYS):
        place = start + tl.arange(0, KEYS)
        inside = place < context_len
        slot = tl.load(table + place // BLOCK_SIZE, inside, 0).to(tl.int64) * (2 * BLOCK_SIZE) + place % BLOCK_SIZE
        entry = cache + (slot * KV_HEADS + head // GROUP)[:, None] * DIM + channel[None, :]
        key = tl.load(entry, inside[:, None] & is_channel[None, :], 0.0)
        value = tl.load(entry + BLOCK_SIZE * KV_HEADS * DIM, inside[:, None] & is_channel[None, :], 0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        seen = place[None, :] <= position[:, None]
        if WINDOW is not None:
            seen = seen & (place[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
        shift = tl.where(top == float("-inf"), 0.0, top)  # a row's window may begin after this tile
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
        largest = top
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token * (KV_HEADS * GROUP) + head) * DIM + channel[None, :], result, mask)


def _decode_tile(is_amd: bool, wide: bool) -> tuple[int, int, int]:
    """Keys, warps and stages."""
    return (32, 4, 2) if wide or is_amd else (64, 4, 3)


def _prefill_tile(is_amd: bool, wide: bool, dim: int) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages."""
    queries, keys, warps = (32, 32, 4) if wide else (64, 64, 4) if dim > 128 else (128, 64, 8)
    return queries, keys, warps, 1 if wide or is_amd else 2


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    splits: int | None = None,
) -> None:
    """q [B, N, D], all one-token rows; writes out. Without `splits`, as many and such tiles as suit the batch."""
    requests, heads, dim = q.shape
    block_size, kv_heads = cache.shape[2:4]
    group, size, found = heads // kv_heads, cache.element_size(), chip(cache.device)
    tile = _decode_tile(found.is_amd, size > 2 or dim > 128)
    if splits is None:
        tile = DECODE.choose(
            found, tile, heads=heads, kv_heads=kv_heads, dim=dim, element_bytes=size, requests=requests
        )
    keys, warps, stages = tile
    is_fixed = splits is not None
    programs = kv_heads * triton.cdiv(group, HEADS)
    shared_bytes = (2 * stages * keys + HEADS) * dim * size + 4096
    splits = splits or num_splits(requests * programs, shared_bytes, cache.device)
    mixed, log_sums = out, None
    if splits > 1:
        mixed = torch.empty((requests, heads, splits, dim), dtype=torch.float32, device=cache.device)
        log_sums = torch.empty((requests, heads, splits), dtype=torch.float32, device=cache.device)
    _gqa_decode_kernel[(requests, programs, splits)](
        q, cache, batch.block_table, batch.seq_lens, mixed, log_sums, scale * LOG2_E, q.stride(0), q.stride(1),
        batch.block_table.stride(0), kv_heads, group, window, block_size, dim, max(next_power_of_two(dim), 16), HEADS,
        keys, splits == 1, num_warps=warps, num_stages=stages, **overlap(cache.device),
    )  # fmt: skip
    if log_sums is not None:
        combine(mixed, log_sums, batch.seq_lens, out, keys, window, is_fixed)


def gqa_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See spec.py. The last dimension of q is contiguous, and so is out."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    single, num_long = batch.num_single, len(batch.query_lens) - batch.num_single
    if single:
        decode(q[:single], cache, batch, scale, window, out[:single])
    if num_long:
        _, heads, dim = q.shape
        block_size, kv_heads = cache.shape[2:4]
        size, found, longest = cache.element_size(), chip(cache.device), max(batch.query_lens[single:])
        rows, keys, warps, stages = PREFILL.choose(
            found, _prefill_tile(found.is_amd, size > 2, dim), heads=heads, kv_heads=kv_heads, dim=dim,
            element_bytes=size, queries=longest,
        )  # fmt: skip
        grid = (heads, num_long, triton.cdiv(longest, rows))
        _gqa_prefill_kernel[grid](
            q, cache, batch.block_table, batch.query_start, batch.seq_lens, out, scale * LOG2_E, q.stride(0),
            q.stride(1), batch.block_table.stride(0), single, kv_heads, heads // kv_heads, window, block_size, dim,
            max(next_power_of_two(dim), 16), rows, keys, num_warps=warps, num_stages=stages, **overlap(cache.device),
        )  # fmt: skip
    return out


KERNEL = Kernel("gqa_attention", "triton", gqa_attention)
