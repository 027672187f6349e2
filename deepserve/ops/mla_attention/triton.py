"""Latent attention in Triton: one-token rows absorbed and split over the context, long rows on keys from latents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import chip, next_power_of_two
from deepserve.ops.op import Kernel
from deepserve.ops.paged import LongRows, long_rows
from deepserve.ops.split_context import HEADS, LOG2_E, combine, num_splits, part_of
from deepserve.runner.batch import Batch

FEW_HEADS = 64  # of all requests: above it a batched product reads W_UV once, not once a request


@triton.jit(do_not_specialize=["table_row"])
def _mla_decode_kernel(
    q_latent,  # [N, B, RANK] at strides latent_head, latent_row, 1
    q_rope,  # [B, N, ROPE] at strides rope_row, rope_head, 1
    cache,  # [slots, RANK + ROPE]
    block_table,  # [B, *] at row stride table_row
    seq_lens,
    mixed,  # fp32 [B, num_heads, splits, RANK]
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
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Scores and sums are kept transposed, [keys, heads] and [channels, heads]: the cache is what fills the tiles."""
    request = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    first, last = part_of(tl.load(seq_lens + request), split, splits, KEYS, None)
    if first >= last:
        return

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < num_heads
    channel = tl.arange(0, RANK_BLOCK)
    pair = tl.arange(0, ROPE_BLOCK)
    mask = (channel[:, None] < RANK) & is_head[None, :]
    q1 = tl.load(q_latent + head[None, :] * latent_head + request * latent_row + channel[:, None], mask, 0.0)
    mask = (pair[:, None] < ROPE) & is_head[None, :]
    q2 = tl.load(q_rope + request * rope_row + head[None, :] * rope_head + pair[:, None], mask, 0.0)

    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([RANK_BLOCK, HEADS], tl.float32)
    table = block_table + request * table_row
    for start in range(first, last, KEYS):
        token = start + tl.arange(0, KEYS)
        seen = token < last
        block = tl.load(table + token // BLOCK_SIZE, seen, 0).to(tl.int64)
        entry = cache + (block * BLOCK_SIZE + token % BLOCK_SIZE)[:, None] * (RANK + ROPE)
        latent = tl.load(entry + channel[None, :], seen[:, None] & (channel[None, :] < RANK), 0.0)
        k_rope = tl.load(entry + RANK + pair[None, :], seen[:, None] & (pair[None, :] < ROPE), 0.0)
        scores = tl.dot(latent, q1, input_precision="ieee")
        scores = tl.dot(k_rope, q2, scores, input_precision="ieee")
        scores = tl.where(seen[:, None], scores * scale_log2, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - top[None, :])
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.sum(weights, 0)
        sums = sums * shrink[None, :]
        sums = tl.dot(tl.trans(latent), weights.to(latent.dtype), sums, input_precision="ieee")
        largest = top

    row = (request * num_heads + head) * splits + split
    out = mixed + row[None, :] * RANK + channel[:, None]
    tl.store(out, sums / total[None, :], (channel[:, None] < RANK) & is_head[None, :])
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
    SPLITS_BLOCK: tl.constexpr,
):
    """A few requests: the combination and the product with W_UV in one."""
    request = tl.program_id(0).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    row = (request * num_heads + head) * splits
    split = tl.arange(0, SPLITS_BLOCK)
    channel = tl.arange(0, RANK_BLOCK)
    column = tl.program_id(2) * V_BLOCK + tl.arange(0, V_BLOCK)
    mask = (column < V)[:, None] & (channel < RANK)[None, :]
    weight = tl.load(w_uv + head * uv_head + column[:, None] * RANK + channel[None, :], mask, 0.0)
    first, last = part_of(tl.load(seq_lens + request), split, splits, KEYS, None)
    used = (split < splits) & (first < last)
    logs = tl.load(log_sums + row + split, used, float("-inf"))
    share = tl.exp2(logs - tl.max(logs, 0))
    share = share / tl.sum(share, 0)
    mask = used[:, None] & (channel < RANK)[None, :]
    parts = tl.load(mixed + (row + split[:, None]) * RANK + channel[None, :], mask, 0.0)
    latent = tl.sum(parts * share[:, None], 0).to(w_uv.dtype.element_ty).to(tl.float32)
    value = tl.sum(weight.to(tl.float32) * latent[None, :], 1)
    tl.store(out + (request * num_heads + head) * V + column, value.to(out.dtype.element_ty), column < V)


@triton.jit
def _mla_prefill_kernel(
    q_nope,  # [T, N, NOPE] at strides nope_row, nope_head, 1
    q_rope,  # [T, N, ROPE] at strides rope_row, rope_head, 1
    k_nope,  # [N, C, NOPE] at strides key_head, NOPE, 1
    k_rope,  # [C, ROPE] at row stride entry_row
    value,  # [N, C, V] at strides value_head, V, 1
    out,  # [T, N, V]
    query_start,  # of the first of these requests: where its tokens begin in q; then the next ones'
    context_start,  # the same of its context in k and v
    scale_log2,
    num_heads,
    nope_row,
    nope_head,
    rope_row,
    rope_head,
    key_head,
    entry_row,
    value_head,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    request = tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    query_begin = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - query_begin
    context_begin = tl.load(context_start + request)
    context_len = tl.load(context_start + request + 1) - context_begin
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest first
    if begin >= query_len:
        return

    row = begin + tl.arange(0, ROWS)
    is_row = row < query_len
    nope = tl.arange(0, NOPE_BLOCK)
    pair = tl.arange(0, ROPE_BLOCK)
    channel = tl.arange(0, V_BLOCK)
    token = (query_begin + row).to(tl.int64)[:, None]
    q1 = tl.load(
        q_nope + token * nope_row + head * nope_head + nope[None, :], is_row[:, None] & (nope < NOPE)[None, :], 0.0
    )
    q2 = tl.load(
        q_rope + token * rope_row + head * rope_head + pair[None, :], is_row[:, None] & (pair < ROPE)[None, :], 0.0
    )
    keys = k_nope + head * key_head + context_begin.to(tl.int64) * NOPE
    ropes = k_rope + context_begin.to(tl.int64) * entry_row
    values = value + head * value_head + context_begin.to(tl.int64) * V

    position = context_len - query_len + row  # of each query in its context
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V_BLOCK], tl.float32)
    whole = (context_len - query_len + begin) // KEYS * KEYS  # keys before it are seen by every row
    last = tl.minimum(context_len - query_len + begin + ROWS, context_len)
    for start in range(0, whole, KEYS):
        key = start + tl.arange(0, KEYS)
        k1 = tl.load(keys + key[None, :] * NOPE + nope[:, None], (nope < NOPE)[:, None], 0.0)
        k2 = tl.load(ropes + key[None, :] * entry_row + pair[:, None], (pair < ROPE)[:, None], 0.0)
        scores = tl.dot(q1, k1, input_precision="ieee")
        scores = tl.dot(q2, k2, scores, input_precision="ieee") * scale_log2
        top = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - top[:, None])
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + key[:, None] * V + channel[None, :], (channel < V)[None, :], 0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        largest = top
    for start in range(whole, last, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < context_len
        k1 = tl.load(keys + key[None, :] * NOPE + nope[:, None], inside[None, :] & (nope < NOPE)[:, None], 0.0)
        k2 = tl.load(ropes + key[None, :] * entry_row + pair[:, None], inside[None, :] & (pair < ROPE)[:, None], 0.0)
        scores = tl.dot(q1, k1, input_precision="ieee")
        scores = tl.dot(q2, k2, scores, input_precision="ieee") * scale_log2
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - top[:, None])
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + key[:, None] * V + channel[None, :], inside[:, None] & (channel < V)[None, :], 0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        largest = top
    mask = is_row[:, None] & (channel < V)[None, :]
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token * num_heads + head) * V + channel[None, :], result, mask)


def _block(size: int) -> int:
    """Channels of a tile: matrix instructions take no fewer than 16."""
    return max(next_power_of_two(size), 16)


def _decode_tile(is_amd: bool, element_size: int) -> tuple[int, int, int]:
    """Keys, warps and stages."""
    return (32, 4, 2) if is_amd or element_size > 2 else (64, 4, 3)


def _prefill_tile(is_amd: bool, element_size: int) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages."""
    if element_size > 2:
        return 32, 32, 4, 1
    return 128, 64, 8, 1 if is_amd else 3


def _decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    out: torch.Tensor,
) -> None:
    """q_latent [N, B, R], q_rope [B, N, P], all one-token rows; writes out [B, N, v]."""
    heads, requests, rank = q_latent.shape
    block_size, rope, found = cache.shape[1], q_rope.shape[2], chip(cache.device)
    keys, warps, stages = _decode_tile(found.is_amd, cache.element_size())
    head_blocks = triton.cdiv(heads, HEADS)
    splits = num_splits(requests * head_blocks, batch.max_seq_len, keys, cache.device)
    mixed = torch.empty((requests, heads, splits, rank), dtype=torch.float32, device=cache.device)
    log_sums = torch.empty((requests, heads, splits), dtype=torch.float32, device=cache.device)
    _mla_decode_kernel[(requests, head_blocks, splits)](
        q_latent, q_rope, cache, batch.block_table, batch.seq_lens, mixed, log_sums, scale * LOG2_E, heads,
        q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1), batch.block_table.stride(0),
        block_size, rank, rope, _block(rank), _block(rope), HEADS, keys,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if requests * heads <= FEW_HEADS:
        v_dim, block = w_uv.shape[1], 32
        _mla_combine_value_kernel[(requests, heads, triton.cdiv(v_dim, block))](
            mixed, log_sums, batch.seq_lens, w_uv, out, w_uv.stride(0), splits, rank, _block(rank), v_dim, block, keys,
            next_power_of_two(splits), num_warps=8,
        )  # fmt: skip
        return
    latents = torch.empty_like(q_latent)
    combine(mixed, log_sums, batch.seq_lens, latents.transpose(0, 1), keys, None)
    torch.bmm(latents, w_uv.transpose(1, 2), out=out.transpose(0, 1))


def _prefill(
    q: tuple[torch.Tensor, torch.Tensor], cache: torch.Tensor, w_uk: torch.Tensor, w_uv: torch.Tensor,
    rows: LongRows, scale: float, out: torch.Tensor,
) -> None:  # fmt: skip
    """Some of a batch's long rows; q and out are those of the whole batch."""
    q_nope, q_rope = q
    heads, v_dim, rank = w_uv.shape
    entries = cache.view(-1, cache.shape[2]).index_select(0, rows.slots)
    latents = entries[:, :rank].unsqueeze(0).expand(heads, -1, -1)
    k_nope, value = torch.bmm(latents, w_uk.transpose(1, 2)), torch.bmm(latents, w_uv.transpose(1, 2))
    tile, keys, warps, stages = _prefill_tile(chip(cache.device).is_amd, cache.element_size())
    nope, rope = q_nope.shape[2], q_rope.shape[2]
    _mla_prefill_kernel[(triton.cdiv(rows.max_query_len, tile), heads, len(rows.query_start) - 1)](
        q_nope, q_rope, k_nope, entries[:, rank:], value, out, rows.query_start, rows.context_start, scale * LOG2_E,
        heads, q_nope.stride(0), q_nope.stride(1), q_rope.stride(0), q_rope.stride(1), k_nope.stride(0),
        entries.stride(0), value.stride(0), nope, rope, v_dim, _block(nope), _block(rope), _block(v_dim), tile, keys,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


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
    """See spec.py. The last dimension of q_nope and q_rope is contiguous, and so is out."""
    single = batch.num_single
    if out is None:
        out = torch.empty((*q_nope.shape[:2], w_uv.shape[1]), dtype=q_nope.dtype, device=q_nope.device)
    if single:
        q_latent = torch.bmm(q_nope[:single].transpose(0, 1), w_uk)
        _decode(q_latent, q_rope[:single], cache, w_uv, batch, scale, out[:single])
    for rows in long_rows(batch):
        _prefill((q_nope, q_rope), cache, w_uk, w_uv, rows, scale, out)
    return out


KERNEL = Kernel("mla_attention", "triton", mla_attention)
