"""Attention on a CPU: decoding requests in a few batched products, long rows through torch's flash kernel.

Needs a CPU. K/V rows are gathered into a buffer that stays in the cache of the core, so memory is read once.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from deepserve.ops.op import Kernel
from deepserve.ops.paged import Group, context_slots, decode_groups, visible
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


def _decode(q: torch.Tensor, rows: torch.Tensor, group: Group, block_size: int, scale: float) -> torch.Tensor:
    """q [b, Nkv, G, D], rows [num_blocks * 2 * block_size, Nkv * D] -> [b, Nkv, G, D]."""
    b, kv_heads, _, dim = q.shape
    # Slot s of block n lies at row s of the K half; n * block_size rows of V lie between the halves of earlier blocks.
    k_rows = group.slots + group.slots.div(block_size, rounding_mode="floor") * block_size
    k = rows.index_select(0, k_rows).view(b, -1, kv_heads * dim)
    v = rows.index_select(0, k_rows + block_size).view(b, -1, kv_heads * dim)
    if kv_heads <= MAX_KV_HEADS and group.slots.shape[0] >= MIN_TOKENS:
        return _block_diagonal(q, k, v, group.mask, scale)
    k, v = (x.view(b, -1, kv_heads, dim).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask.unsqueeze(1), scale=scale)


def _long(
    q: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, block_size: int, scale: float, window: int | None
) -> torch.Tensor:
    """q [Lq, N, D] of the last Lq tokens, slots [L] of all -> [Lq, N, D]."""
    query_len, _, dim = q.shape
    first = 0 if window is None else max(0, len(slots) - query_len - window + 1)
    slots = slots[first:]
    k_rows = slots + slots.div(block_size, rounding_mode="floor") * block_size
    k, v = (rows.index_select(0, r).view(1, len(slots), -1, dim).transpose(1, 2) for r in (k_rows, k_rows + block_size))
    whole = window is None and len(slots) == query_len
    mask = None if whole else visible(query_len, len(slots), window, q.device)
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
    )
    return y[0].transpose(0, 1)


def function(q: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float, window: int | None) -> torch.Tensor:
    """gqa_attention."""
    size, kv_heads, dim = cache.shape[2:]
    rows = cache.view(-1, kv_heads * dim)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    grouped, written = (x.view(x.shape[0], kv_heads, -1, dim) for x in (q, out))
    for group in decode_groups(batch, window, 2 * rows.shape[1] * cache.element_size(), q.dtype):
        if group.requests is None:
            written[: batch.num_single] = _decode(grouped[: batch.num_single], rows, group, size, scale)
        else:
            written[group.requests] = _decode(grouped[group.requests], rows, group, size, scale)
    start = batch.num_single
    for request in range(batch.num_single, len(batch.query_lens)):
        end = start + batch.query_lens[request]
        out[start:end] = _long(q[start:end], rows, context_slots(batch, request), size, scale, window)
        start = end
    return out


KERNEL = Kernel("gqa_attention", "cpu", function)
