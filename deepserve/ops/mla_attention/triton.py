"""Latent attention in Triton: one-token rows absorbed and split over the context, long rows on keys from latents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.kv_cache.spec import EXPANDED_BYTES, LARGEST_RANK
from deepserve.ops.launch import chip, next_power_of_two
from deepserve.ops.merge_attention.triton import merge_attention
from deepserve.ops.mla_attention.entries import Entries
from deepserve.ops.mla_attention.tiles import DECODE, PREFILL
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.paged import LongRows, long_rows
from deepserve.ops.split_context import FIXED_SPLITS, HEADS, LOG2_E, SPLITS_AT_ONCE, combine, num_splits, part_of
from deepserve.runner.batch import Batch

MANY_TOKENS = 64  # above it a batched product reads its inputs once, not once a tile
FEW_REQUESTS = 4  # up to here parts are combined in the same kernel that multiplies with W_UV


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    """Masks cost instructions even where they are all true."""
    if MASKED:
        values = tl.load(pointers, mask, 0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit(do_not_specialize=["table_row"])
def _mla_decode_kernel(
    q_latent,  # [N, B, RANK] at strides latent_head, latent_row, 1
    q_rope,  # [B, N, ROPE] at strides rope_row, rope_head, 1
    latents,  # the latents, rope channels and scales (None where latents are not FP8) of entries.py:Entries
    ropes,
    scales,
    block_table,  # [B, *] at row stride table_row
    seq_lens,
    mixed,  # fp32 [B, num_heads, splits, RANK]; with WHOLE the result itself, [num_heads, B, RANK]
    log_sums,  # fp32 [B, num_heads, splits]: log2 of each part's sum of exponentials
    scale_log2,
    num_heads,
    latent_head,
    latent_row,
    rope_row,
    rope_head,
    table_row,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    LATENT_WIDTH: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    ROPE_AT: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    SCALE_AT: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,  # there is one part, which is the context
    OVERLAP: tl.constexpr,
):
    """Scores and sums are kept transposed, [keys, heads] and [channels, heads]: the cache is what fills the tiles.

    Block ids are read a tile ahead, so that the copies of the cache's entries wait for nothing.
    """
    wait(OVERLAP)
    request = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    first, last = part_of(tl.load(seq_lens + request), split, splits, KEYS, None)
    if first >= last:
        return

    ONE_BLOCK: tl.constexpr = BLOCK_SIZE % KEYS == 0  # a tile lies in one
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < num_heads
    channel = tl.arange(0, RANK_BLOCK)
    pair = tl.arange(0, ROPE_BLOCK)
    inside = (channel[:, None] < RANK) & is_head[None, :]
    q1 = tl.load(q_latent + head[None, :] * latent_head + request * latent_row + channel[:, None], inside, 0.0)
    mask = (pair[:, None] < ROPE) & is_head[None, :]
    q2 = tl.load(q_rope + request * rope_row + head[None, :] * rope_head + pair[:, None], mask, 0.0)

    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([RANK_BLOCK, HEADS], tl.float32)
    table = block_table + request * table_row
    place = tl.arange(0, KEYS)
    if ONE_BLOCK:
        block = tl.load(table + first // BLOCK_SIZE)
    else:
        block = tl.load(table + (first + place) // BLOCK_SIZE, first + place < last, 0)
    for start in range(first, last, KEYS):
        token = start + place
        seen = (token < last)[:, None]
        if ONE_BLOCK:  # all but a scalar is the same for every tile
            slot = block.to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE + place
            block = tl.load(table + tl.minimum(start + KEYS, last - 1) // BLOCK_SIZE)
        else:
            slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
            block = tl.load(table + (token + KEYS) // BLOCK_SIZE, token + KEYS < last, 0)
        entry = latents + slot[:, None] * LATENT_WIDTH + channel[None, :]
        latent = tl.load(entry, seen & (channel < RANK)[None, :], 0.0).to(q1.dtype)
        entry = ropes + slot[:, None] * ROPE_WIDTH + ROPE_AT + pair[None, :]
        k_rope = tl.load(entry, seen & (pair < ROPE)[None, :], 0.0)
        if scales is None:
            scores = tl.dot(latent, q1, input_precision="ieee")
            scores = tl.dot(k_rope, q2, scores, input_precision="ieee") * scale_log2
        else:
            factor = tl.load(scales + slot * SCALE_WIDTH + SCALE_AT, token < last, 0.0)[:, None]
            scores = tl.dot(latent, q1, input_precision="ieee") * factor
            scores = (scores + tl.dot(k_rope, q2, input_precision="ieee")) * scale_log2
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - top[None, :])
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.sum(weights, 0)
        if scales is not None:
            weights = weights * factor
        sums = tl.dot(tl.trans(latent), weights.to(latent.dtype), sums * shrink[None, :], input_precision="ieee")
        largest = top

    sums = sums / total[None, :]
    if WHOLE:
        row = head.to(tl.int64) * tl.num_programs(0) + request
        tl.store(mixed + row[None, :] * RANK + channel[:, None], sums.to(mixed.dtype.element_ty), inside)
    else:
        row = (request * num_heads + head) * splits + split
        tl.store(mixed + row[None, :] * RANK + channel[:, None], sums, inside)
        tl.store(log_sums + row, largest + tl.log2(total), is_head)


@triton.jit(do_not_specialize=["splits"])
def _mla_combine_value_kernel(
    mixed,  # fp32 [B, N, splits, RANK]
    log_sums,  # fp32 [B, N, splits]
    seq_lens,
    w_uv,  # [N, V, RANK] at head stride uv_head
    out,  # [B, N, V]
    uv_head,
    splits,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    V: tl.constexpr,
    V_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,  # at a time
    OVERLAP: tl.constexpr,
):
    """A few requests: the combination and the product with W_UV in one."""
    request = tl.program_id(0).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    row = (request * num_heads + head) * splits
    channel = tl.arange(0, RANK_BLOCK)
    column = tl.program_id(2) * V_BLOCK + tl.arange(0, V_BLOCK)
    mask = (column < V)[:, None] & (channel < RANK)[None, :]
    weight = tl.load(w_uv + head * uv_head + column[:, None] * RANK + channel[None, :], mask, 0.0)
    wait(OVERLAP)
    seq_len = tl.load(seq_lens + request)
    num_used = tl.cdiv(seq_len, tl.cdiv(tl.cdiv(seq_len, splits), KEYS) * KEYS)  # parts that are not empty
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    latent = tl.zeros([RANK_BLOCK], tl.float32)
    for start in range(0, num_used, SPLITS):
        split = start + tl.arange(0, SPLITS)
        used = split < num_used
        logs = tl.load(log_sums + row + split, used, float("-inf"))
        top = tl.maximum(largest, tl.max(logs, 0))
        share = tl.exp2(logs - top)
        shrink = tl.exp2(largest - top)
        inside = used[:, None] & (channel < RANK)[None, :]
        parts = tl.load(mixed + (row + split[:, None]) * RANK + channel[None, :], inside, 0.0)
        total = total * shrink + tl.sum(share, 0)
        latent = latent * shrink + tl.sum(parts * share[:, None], 0)
        largest = top
    latent = (latent / total).to(w_uv.dtype.element_ty).to(tl.float32)
    value = tl.sum(weight.to(tl.float32) * latent[None, :], 1)
    tl.store(out + (request * num_heads + head) * V + column, value.to(out.dtype.element_ty), column < V)


@triton.jit(do_not_specialize=["num_tokens"])
def _head_product_kernel(
    x,  # [T, N, IN] at strides x_row, x_head, 1
    weight,  # [N, IN, OUT] at strides w_head, w_in, w_out
    out,  # [T, N, OUT] at strides out_row, out_head, 1
    num_tokens,
    x_row,
    x_head,
    w_head,
    w_in,
    w_out,
    out_row,
    out_head,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A product of its own for every head, of up to M tokens a program; its weights are there before its inputs.

    Computed transposed, [columns, tokens]: a few tokens would leave matrix instructions empty.
    """
    head = tl.program_id(1)
    channel = tl.arange(0, IN_BLOCK)
    column = tl.program_id(2) * N + tl.arange(0, N)
    mask = (column < OUT)[:, None] & (channel < IN)[None, :]
    left = tl.load(weight + head * w_head + column[:, None] * w_out + channel[None, :] * w_in, mask, 0.0)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    mask = (channel < IN)[:, None] & (row < num_tokens)[None, :]
    right = tl.load(x + row[None, :] * x_row + head * x_head + channel[:, None], mask, 0.0)
    y = tl.dot(left, right, input_precision="ieee").to(out.dtype.element_ty)
    mask = (column < OUT)[:, None] & (row < num_tokens)[None, :]
    tl.store(out + row[None, :] * out_row + head * out_head + column[:, None], y, mask)


@triton.jit(do_not_specialize=["offset", "key_head", "value_head"])
def _mla_prefill_kernel(
    q_nope,  # [T, N, NOPE] at strides nope_row, nope_head, 1
    q_rope,  # [T, N, ROPE] at strides rope_row, rope_head, 1
    k_nope,  # [N, C, NOPE] at strides key_head * NOPE, NOPE, 1
    k_rope,  # [C, ROPE] at row stride entry_row
    value,  # [N, C, V] at strides key_head * V, V, 1
    out,  # [T, N, V]; with PARTIAL fp32 [rows' tokens, N, V]
    log_sums,  # with PARTIAL fp32 [rows' tokens, N]: log2 of the sums of exponentials
    query_start,  # of the first of these requests: where its tokens begin in q; then the next ones'
    context_start,  # the same of its context in k and v
    seq_lens,
    offset,  # tokens of the contexts that come before
    scale_log2,
    num_heads,
    nope_row,
    nope_head,
    rope_row,
    rope_head,
    key_head,
    entry_row,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTIAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    head, request = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_begin = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - query_begin
    context_begin = tl.load(context_start + request)
    num_keys = tl.load(context_start + request + 1) - context_begin
    begin = (tl.num_programs(2) - 1 - tl.program_id(2)) * ROWS  # the longest first, of all heads and requests
    if begin >= query_len:
        return

    row = begin + tl.arange(0, ROWS)
    is_row = row < query_len
    nope = tl.arange(0, NOPE_BLOCK)
    pair = tl.arange(0, ROPE_BLOCK)
    channel = tl.arange(0, V_BLOCK)
    token = (query_begin + row).to(tl.int64)[:, None]
    mask = is_row[:, None] & (nope < NOPE)[None, :]
    q1 = tl.load(q_nope + token * nope_row + head * nope_head + nope[None, :], mask, 0.0)
    mask = is_row[:, None] & (pair < ROPE)[None, :]
    q2 = tl.load(q_rope + token * rope_row + head * rope_head + pair[None, :], mask, 0.0)
    keys = k_nope + (head * key_head + context_begin) * NOPE
    ropes = k_rope + context_begin.to(tl.int64) * entry_row
    values = value + (head * key_head + context_begin) * V

    NOPE_CUT: tl.constexpr = NOPE != NOPE_BLOCK
    ROPE_CUT: tl.constexpr = ROPE != ROPE_BLOCK
    V_CUT: tl.constexpr = V != V_BLOCK
    start_position = tl.load(seq_lens + request) - query_len + begin - offset  # of the first query among these keys
    position = start_position + tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V_BLOCK], tl.float32)
    whole = tl.minimum(tl.maximum(start_position, 0), num_keys) // KEYS * KEYS  # keys before it are seen by every row
    last = tl.minimum(start_position + ROWS, num_keys)
    for start in range(0, whole, KEYS):
        key = start + tl.arange(0, KEYS)
        k1 = _load(keys + key[None, :] * NOPE + nope[:, None], (nope < NOPE)[:, None], NOPE_CUT)
        k2 = _load(ropes + key[None, :] * entry_row + pair[:, None], (pair < ROPE)[:, None], ROPE_CUT)
        scores = tl.dot(q1, k1, input_precision="ieee")
        scores = tl.dot(q2, k2, scores, input_precision="ieee")
        top = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - top[:, None])  # one instruction for both, before the exponential
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.sum(weights, 1)
        v = _load(values + key[:, None] * V + channel[None, :], (channel < V)[None, :], V_CUT)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        largest = top
    for start in range(whole, last, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < num_keys
        k1 = tl.load(keys + key[None, :] * NOPE + nope[:, None], inside[None, :] & (nope < NOPE)[:, None], 0.0)
        k2 = tl.load(ropes + key[None, :] * entry_row + pair[:, None], inside[None, :] & (pair < ROPE)[:, None], 0.0)
        scores = tl.dot(q1, k1, input_precision="ieee")
        scores = tl.dot(q2, k2, scores, input_precision="ieee")
        seen = key[None, :] <= position[:, None]
        if PARTIAL:  # there are keys after these
            seen = seen & inside[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
        shift = tl.where(top == float("-inf"), 0.0, top)  # of a slice that comes after a query: it sees nothing
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + key[:, None] * V + channel[None, :], inside[:, None] & (channel < V)[None, :], 0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        largest = top
    mask = is_row[:, None] & (channel < V)[None, :]
    if PARTIAL:
        place = (query_begin - tl.load(query_start) + row).to(tl.int64) * num_heads + head
        tl.store(out + place[:, None] * V + channel[None, :], sums / tl.where(total > 0, total, 1.0)[:, None], mask)
        tl.store(log_sums + place, largest + tl.log2(total), is_row)
    else:
        result = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * num_heads + head) * V + channel[None, :], result, mask)


def _block(size: int) -> int:
    """Channels of a tile: matrix instructions take no fewer than 16."""
    return max(next_power_of_two(size), 16)


def _decode_tile(heads: int, element_size: int, is_amd: bool, is_fp8: bool) -> tuple[int, int, int]:
    """Keys, warps and stages for a tile of so many heads. Two tiles of 64 entries are what fits on chip: one is read
    while one is used. FP8 ones are halved, for they are in registers before they are multiplied."""
    if element_size > 2:
        return 32, 4, 2
    if is_amd:
        return (32 if heads <= HEADS else 16), 4, 2
    if is_fp8:
        return 32, 8, 3
    return 64, 4 if heads <= HEADS else 8, 2


def _prefill_tile(element_size: int, is_amd: bool) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages."""
    if element_size > 2:
        return 32, 32, 4, 1
    return (128, 32, 8, 1) if is_amd else (128, 64, 8, 3)


def _head_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """x [T, N, IN] times weight [N, IN, OUT] for every head -> out [T, N, OUT], any strides in the first dimensions."""
    if len(x) > MANY_TOKENS or x.shape[2] > LARGEST_RANK:
        torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
        return
    head_product(x, weight, out, 16 if len(x) <= 16 else 32)


def head_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, m: int) -> None:
    """_head_product, m tokens a program; IN is at most LARGEST_RANK."""
    (num_tokens, heads, size), columns = x.shape, weight.shape[2]
    _head_product_kernel[(triton.cdiv(num_tokens, m), heads, triton.cdiv(columns, 64))](
        x, weight, out, num_tokens, x.stride(0), x.stride(1), *weight.stride(), out.stride(0), out.stride(1), size,
        columns, _block(size), m, 64, num_warps=4, **overlap(x.device),
    )  # fmt: skip


def decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    entries: Entries,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    out: torch.Tensor,
) -> None:
    """q_latent [N, B, R], q_rope [B, N, P], all one-token rows; writes out [B, N, v]."""
    latents, parts, keys = _mix(q_latent, q_rope, entries, batch, scale, None)
    heads, requests, rank = q_latent.shape
    if parts and requests <= FEW_REQUESTS:
        (mixed, log_sums), v_dim, block = parts, w_uv.shape[1], 32
        _mla_combine_value_kernel[(requests, heads, triton.cdiv(v_dim, block))](
            mixed, log_sums, batch.seq_lens, w_uv, out, w_uv.stride(0), mixed.shape[2], rank, _block(rank), v_dim,
            block, keys, 4 * SPLITS_AT_ONCE, num_warps=8, **overlap(out.device),
        )  # fmt: skip
        return
    if parts:
        combine(*parts, batch.seq_lens, latents.transpose(0, 1), keys, None, is_fixed=False)
    _head_product(latents.transpose(0, 1), w_uv.transpose(1, 2), out)


def mix_in_parts(
    q_latent: torch.Tensor, q_rope: torch.Tensor, entries: Entries, batch: Batch, scale: float
) -> torch.Tensor:
    """What each row of q_latent [N, B, R] attends to [N, B, R], computed alike whatever the batch is."""
    latents, parts, keys = _mix(q_latent, q_rope, entries, batch, scale, FIXED_SPLITS)
    assert parts is not None
    combine(*parts, batch.seq_lens, latents.transpose(0, 1), keys, None, is_fixed=True)
    return latents


def _mix(
    q_latent: torch.Tensor, q_rope: torch.Tensor, entries: Entries, batch: Batch, scale: float, splits: int | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None, int]:
    """(latents [N, B, R] that the rows attend to; None, or what is still to be combined to them: fp32 [B, N, splits,
    R], [B, N, splits]; keys of a tile). Without `splits`, as many and such tiles as suit the batch."""
    heads, requests, rank = q_latent.shape
    rope, device, size = entries.rope_dim, q_latent.device, q_latent.element_size()
    found = chip(device)
    head_tile = HEADS if heads <= HEADS or size > 2 else 32
    tile = _decode_tile(head_tile, size, found.is_amd, entries.scales is not None)
    if splits is None:
        tile = DECODE.choose(
            found, tile, heads=heads, requests=requests, entry=rank + rope,
            element_bytes=entries.latents.element_size(),
        )  # fmt: skip
    keys, warps, stages = tile
    if entries.block_size % keys:  # addresses of entries of several blocks take twice the registers
        keys = max(keys // 2, 16)
    head_blocks = triton.cdiv(heads, head_tile)
    shared_bytes = stages * keys * entries.entry_bytes + head_tile * (rank + rope) * size + 4096
    if entries.scales is not None:
        shared_bytes += keys * rank * size  # the latents that are multiplied
    splits = splits or num_splits(requests * head_blocks, shared_bytes, device)
    mixed = latents = torch.empty_like(q_latent)
    log_sums = None
    if splits > 1:
        mixed = torch.empty((requests, heads, splits, rank), dtype=torch.float32, device=device)
        log_sums = torch.empty((requests, heads, splits), dtype=torch.float32, device=device)
    _mla_decode_kernel[(requests, head_blocks, splits)](
        q_latent, q_rope, entries.latents, entries.ropes, entries.scales, batch.block_table, batch.seq_lens, mixed,
        log_sums, scale * LOG2_E, heads, q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1),
        batch.block_table.stride(0), entries.block_size, rank, rope, _block(rank), _block(rope), entries.latent_width,
        entries.rope_width, entries.rope_at, entries.scale_width, entries.scale_at, head_tile, keys, splits == 1,
        num_warps=warps, num_stages=stages, **overlap(device),
    )  # fmt: skip
    return latents, None if log_sums is None else (mixed, log_sums), keys


def _prefill(
    q: tuple[torch.Tensor, torch.Tensor], entries: Entries, w_uk: torch.Tensor, w_uv: torch.Tensor,
    rows: LongRows, scale: float, out: torch.Tensor, log_sums: torch.Tensor | None,
) -> None:  # fmt: skip
    """Some of a batch's long rows; q is that of the whole batch, and so is out without log_sums."""
    q_nope, q_rope = q
    heads, v_dim, _ = w_uv.shape
    latents, k_rope = entries.read(rows.slots)
    latents = latents.unsqueeze(0).expand(heads, -1, -1)
    k_nope, value = torch.bmm(latents, w_uk.transpose(1, 2)), torch.bmm(latents, w_uv.transpose(1, 2))
    nope, rope, found, size = q_nope.shape[2], q_rope.shape[2], chip(out.device), q_nope.element_size()
    tile, keys, warps, stages = PREFILL.choose(
        found, _prefill_tile(size, found.is_amd), heads=heads, queries=rows.max_query_len, nope=nope, rope=rope,
        v=v_dim, element_bytes=size,
    )  # fmt: skip
    _mla_prefill_kernel[(heads, len(rows.seq_lens), triton.cdiv(rows.max_query_len, tile))](
        q_nope, q_rope, k_nope, k_rope, value, out, log_sums, rows.query_start, rows.context_start,
        rows.seq_lens, rows.offset, scale * LOG2_E, heads, q_nope.stride(0), q_nope.stride(1), q_rope.stride(0),
        q_rope.stride(1), len(k_rope), k_rope.stride(0), nope, rope, v_dim, _block(nope), _block(rope), _block(v_dim),
        tile, keys, log_sums is not None, num_warps=warps, num_stages=stages, **overlap(out.device),
    )  # fmt: skip


def _prefill_slices(
    q: tuple[torch.Tensor, torch.Tensor], entries: Entries, w_uk: torch.Tensor, w_uv: torch.Tensor,
    slices: list[LongRows], scale: float, out: torch.Tensor,
) -> None:  # fmt: skip
    """Long rows whose context is too long to be expanded at once: each slice is attended to, and the results merged."""
    if len(slices) == 1:
        _prefill(q, entries, w_uk, w_uv, slices[0], scale, out, None)
        return
    rows = out[slices[0].tokens]
    so_far: tuple[torch.Tensor, torch.Tensor] | None = None
    for one in slices:
        part = torch.empty(rows.shape, dtype=torch.float32, device=out.device)
        log_sums = torch.empty(rows.shape[:2], dtype=torch.float32, device=out.device)
        _prefill(q, entries, w_uk, w_uv, one, scale, part, log_sums)
        so_far = (part, log_sums) if so_far is None else merge_attention(*so_far, part, log_sums, out=so_far)
    assert so_far is not None
    rows.copy_(so_far[0])


def attend(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    entries: Entries,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """mla_attention over any kind of entries. The last dimension of q_nope and q_rope is contiguous, and so is out."""
    single, (heads, v_dim, rank) = batch.num_single, w_uv.shape
    if out is None:
        out = torch.empty((len(q_nope), heads, v_dim), dtype=q_nope.dtype, device=q_nope.device)
    if single:
        q_latent = torch.empty((heads, single, rank), dtype=q_nope.dtype, device=q_nope.device)
        _head_product(q_nope[:single], w_uk, q_latent.transpose(0, 1))
        decode(q_latent, q_rope[:single], entries, w_uv, batch, scale, out[:single])
    for slices in long_rows(batch, EXPANDED_BYTES // (heads * (w_uk.shape[1] + v_dim) * q_nope.element_size())):
        _prefill_slices((q_nope, q_rope), entries, w_uk, w_uv, slices, scale, out)
    return out


def mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See spec.py and `attend`."""
    return attend(q_nope, q_rope, Entries.plain(cache, w_uk.shape[2]), w_uk, w_uv, batch, scale, out)


KERNEL = Kernel("mla_attention", "triton", mla_attention)
