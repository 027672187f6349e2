"""Latent attention on a CPU: rows of a few tokens absorbed, in a few batched products, long ones chunk by chunk.

Needs a CPU. Latents are gathered into a buffer of bounded size; the keys and values of long rows are made for as many
heads at a time as fit into another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepserve.ops.op import Kernel
from deepserve.ops.paged import Group, causal_attention, context_slots, decode_groups, taken_apart
from deepserve.runner.batch import Batch

LONG_BYTES = 64 << 20  # keys and values of long rows, made from latents


# (slots [n], out [n, R + P]) -> out, filled with the entries at those slots
Gather = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _absorbed(
    q: torch.Tensor, gather: Gather, group: Group, buffer: torch.Tensor, rank: int, scale: float
) -> torch.Tensor:
    """q [b, N, R + P] -> the mixed latents [b, N, R]; the gathered ones go to `buffer`."""
    latents = gather(group.slots, buffer[: len(group.slots)]).view(len(q), -1, q.shape[2])
    scores = torch.baddbmm(group.mask, q, latents.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), latents)[..., :rank]


def _single(q: torch.Tensor, gather: Gather, batch: Batch, rank: int, scale: float) -> torch.Tensor:
    """q [num_single, N, R + P] -> [num_single, N, R]."""
    width = q.shape[2]
    groups = decode_groups(batch, None, width * q.element_size(), q.dtype)
    key = ("mla_attention.cpu", width)
    if key not in batch.derived:  # one buffer for all groups and layers, so that it stays in the cache
        batch.derived[key] = q.new_empty(max(len(group.slots) for group in groups), width)
    buffer = batch.derived[key]
    if groups[0].requests is None:
        return _absorbed(q, gather, groups[0], buffer, rank, scale)
    out = q.new_empty(*q.shape[:2], rank)
    for group in groups:
        out[group.requests] = _absorbed(q[group.requests], gather, group, buffer, rank, scale)
    return out


def _long(
    q: torch.Tensor, entries: torch.Tensor, w_uk: torch.Tensor, w_uv: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """q [Lq, N, nope + P] of the last Lq tokens, entries [L, R + P] of all; writes out [Lq, N, v]."""
    rank, length = w_uk.shape[2], len(entries)
    latent, k_rope = entries.split([rank, entries.shape[1] - rank], -1)
    queries = q.transpose(0, 1).unsqueeze(1)
    step = max(1, LONG_BYTES // (length * (q.shape[2] + w_uv.shape[1]) * q.element_size()))
    for head in range(0, len(w_uk), step):
        uk, uv = w_uk[head : head + step], w_uv[head : head + step]
        k = torch.cat((latent @ uk.transpose(1, 2), k_rope.expand(len(uk), -1, -1)), -1)
        y = causal_attention(queries[head : head + step], k, latent @ uv.transpose(1, 2), scale)
        out[:, head : head + step] = y.squeeze(1).transpose(0, 1)


def attend(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    gather: Gather,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """mla_attention, whatever the cache is made of."""
    batch = taken_apart(batch)
    rank, single = w_uk.shape[2], batch.num_single
    out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
    if single:
        absorbed = torch.bmm(q_nope[:single].transpose(0, 1), w_uk).transpose(0, 1)
        mixed = _single(torch.cat((absorbed, q_rope[:single]), -1), gather, batch, rank, scale)
        out[:single] = torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
    start = single
    for request in range(single, len(batch.query_lens)):
        end = start + batch.query_lens[request]
        q = torch.cat((q_nope[start:end], q_rope[start:end]), -1)
        slots = context_slots(batch, request)
        _long(q, gather(slots, q.new_empty(len(slots), rank + q_rope.shape[2])), w_uk, w_uv, scale, out[start:end])
        start = end
    return out


def function(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """mla_attention."""
    rows = cache.view(-1, cache.shape[2])

    def gather(slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.index_select(rows, 0, slots, out=out)

    return attend(q_nope, q_rope, gather, w_uk, w_uv, batch, scale)


KERNEL = Kernel("mla_attention", "cpu", function, dict.fromkeys(("w_uk", "w_uv"), torch.Tensor.contiguous))
