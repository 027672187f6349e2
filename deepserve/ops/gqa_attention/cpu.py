"""Attention on a CPU: decoding requests in a few batched products, long rows chunk by chunk.

Needs a CPU. K/V rows are gathered into a buffer that stays in the cache of the core, so memory is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from deepserve.ops.op import Kernel
from deepserve.ops.paged import Group, causal_attention, context_slots, decode_groups, visible
from deepserve.runner.batch import Batch

# One product over all K/V heads at once (queries padded with zeros to block-diagonal rows) does Nkv times the FLOPs in
# 1 / Nkv of the calls: it wins where rows are narrow and there is enough work.
MAX_KV_HEADS = 8
MIN_TOKENS = 1024


@cache
def _eye(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(n, dtype=dtype).view(1, n, 1, n, 1)


def _block_diagonal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [b, Nkv, G, D], k and v [b, L, Nkv * D], mask [b, 1, L] additive -> [b, Nkv, G, D]."""
    b, kv_heads, groups, dim = q.shape
    wide = (q.unsqueeze(3) * _eye(kv_heads, q.dtype)).view(b, kv_heads * groups, kv_heads * dim)
    scores = torch.baddbmm(mask, wide, k.transpose(1, 2), alpha=scale)
    out = torch.bmm(scores.softmax(-1), v).view(b, kv_heads, groups, kv_heads, dim)
    return out.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class _Gather:
    """A group of decoding requests, which rows of the cache its K and V are, and buffers [b * L, Nkv * D] for them."""

    group: Group
    k_rows: torch.Tensor
    v_rows: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def _gathers(batch: Batch, window: int | None, rows: torch.Tensor) -> list[_Gather]:
    """Worked out once a step; the buffers are the same for every group and layer, so that they stay in the cache."""
    key = ("gqa_attention.cpu", window, rows.shape[1])
    if key not in batch.derived:
        width = rows.shape[1]
        groups = decode_groups(batch, window, 2 * width * rows.element_size(), rows.dtype)
        longest = max((len(group.slots) for group in groups), default=0)
        k, v = rows.new_empty(2, longest, width)
        batch.derived[key] = [
            _Gather(group, *_kv_rows(group.slots, batch.block_size), k[: len(group.slots)], v[: len(group.slots)])
            for group in groups
        ]
    gathers: list[_Gather] = batch.derived[key]
    return gathers


def _kv_rows(slots: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a cache viewed as [num_blocks * 2 * block_size, Nkv * D] where K and V of each slot are."""
    k_rows = slots + slots.div(block_size, rounding_mode="floor") * block_size
    return k_rows, k_rows + block_size


def _decode(q: torch.Tensor, rows: torch.Tensor, gather: _Gather, scale: float) -> torch.Tensor:
    """q [b, Nkv, G, D], rows [num_blocks * 2 * block_size, Nkv * D] -> [b, Nkv, G, D]."""
    b, kv_heads, _, dim = q.shape
    k = torch.index_select(rows, 0, gather.k_rows, out=gather.k).view(b, -1, kv_heads * dim)
    v = torch.index_select(rows, 0, gather.v_rows, out=gather.v).view(b, -1, kv_heads * dim)
    if kv_heads <= MAX_KV_HEADS and len(gather.k_rows) >= MIN_TOKENS:
        return _block_diagonal(q, k, v, gather.group.mask, scale)
    k, v = (x.view(b, -1, kv_heads, dim).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=gather.group.mask.unsqueeze(1), scale=scale)


def _long(
    q: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int, scale: float, window: int | None
) -> torch.Tensor:
    """q [Lq, N, D] of the last Lq tokens, slots [L] of all -> [Lq, N, D]."""
    query_len, _, dim = q.shape
    first = 0 if window is None else max(0, len(slots) - query_len - window + 1)
    slots = slots[first:]
    kv_rows = _kv_rows(slots, block_size)
    k, v = (rows.index_select(0, which).view(len(slots), -1, dim).transpose(0, 1) for which in kv_rows)
    queries = q.transpose(0, 1)
    if window is None:
        return causal_attention(queries.unflatten(0, (len(k), -1)), k, v, scale).flatten(0, 1).transpose(0, 1)
    seen = visible(query_len, len(slots), window, q.device)
    y = F.scaled_dot_product_attention(queries[None], k[None], v[None], attn_mask=seen, scale=scale, enable_gqa=True)
    return y[0].transpose(0, 1)


def function(q: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float, window: int | None) -> torch.Tensor:
    """gqa_attention."""
    size, kv_heads, dim = cache.shape[2:]
    rows = cache.view(-1, kv_heads * dim)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    grouped, written = (x.view(x.shape[0], kv_heads, -1, dim) for x in (q, out))
    for gather in _gathers(batch, window, rows):
        which = slice(batch.num_single) if gather.group.requests is None else gather.group.requests
        written[which] = _decode(grouped[which], rows, gather, scale)
    start = batch.num_single
    for request in range(batch.num_single, len(batch.query_lens)):
        end = start + batch.query_lens[request]
        out[start:end] = _long(q[start:end], rows, context_slots(batch, request), size, scale, window)
        start = end
    return out


KERNEL = Kernel("gqa_attention", "cpu", function)
