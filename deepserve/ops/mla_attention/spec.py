"""Multi-head latent attention: every head reads one cached latent a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepserve.ops.op import Case, Cost, nbytes, op
from deepserve.ops.paged import context_slots, make_batch, visible
from deepserve.runner.batch import Batch

Shape = tuple[int, int, int, int, int, int]  # heads, nope, rope, kv rank, v, block size
# (entries [n, R + P], R, their slots, (num_blocks, block_size)) -> a cache with them
Store = Callable[[torch.Tensor, int, torch.Tensor, tuple[int, int]], torch.Tensor]


def make_case(
    name: str, queries: list[int], contexts: list[int], shape: Shape, store: Store, more: tuple[Any, ...] = ()
) -> Case:
    """A batch whose context `store` puts into a cache; `more` are arguments after the scale."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        heads, nope, rope, rank, v_dim, block_size = shape
        batch, num_blocks = make_batch(queries, contexts, block_size, generator, device)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        slots = torch.cat([context_slots(batch, i) for i in range(len(queries))])
        cache = store(normal(len(slots), rank + rope), rank, slots, (num_blocks, block_size))
        q_nope, q_rope = normal(sum(queries), heads, nope), normal(sum(queries), heads, rope)
        w_uk, w_uv = normal(heads, nope, rank, scale=rank**-0.5), normal(heads, v_dim, rank, scale=rank**-0.5)
        return q_nope, q_rope, cache, w_uk, w_uv, batch, (nope + rope) ** -0.5, *more

    return Case(name, make, bench=sum(contexts) > 4000)


def _store(entries: torch.Tensor, rank: int, slots: torch.Tensor, blocks: tuple[int, int]) -> torch.Tensor:
    """Slots that are not written hold NaN."""
    cache = torch.full((*blocks, entries.shape[1]), torch.nan, dtype=entries.dtype, device=entries.device)
    cache.view(-1, entries.shape[1])[slots] = entries
    return cache


def _case(name: str, queries: list[int], contexts: list[int], shape: Shape) -> Case:
    return make_case(name, queries, contexts, shape, _store)


def cost_of(
    q_nope: torch.Tensor, q_rope: torch.Tensor, entry_bytes: int, w_uk: torch.Tensor, w_uv: torch.Tensor, batch: Batch
) -> Cost:
    """Every entry of the context read once, whatever it is made of."""
    lens = zip(batch.query_lens, batch.context_lens)
    pairs = sum(query * (context - (query - 1) / 2) for query, context in lens)
    tokens, heads, _ = q_nope.shape
    written = tokens * heads * w_uv.shape[1] * q_nope.element_size()
    per_pair = q_nope.shape[2] + q_rope.shape[2] + w_uv.shape[1]
    read = sum(batch.context_lens) * entry_bytes + nbytes(q_nope, q_rope, w_uk, w_uv)
    return Cost(read + written, int(2 * pairs * heads * per_pair))


def _cost(q_nope: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, *rest: Any) -> Cost:
    return cost_of(q_nope, q_rope, cache.shape[-1] * cache.element_size(), *rest[:3])


def attend(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    read: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """mla_attention, whatever the cache is made of: read(slots [L]) -> the latents [L, R] and rope channels [L, P]."""
    out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
    uk, uv = w_uk.float(), w_uv.float()
    end = 0
    for request, query_len in enumerate(batch.query_lens):
        start, end = end, end + query_len
        latent, k_rope = (part.float() for part in read(context_slots(batch, request)))
        nope, rope = q_nope[start:end].float(), q_rope[start:end].float()
        if request < batch.num_single:
            query = torch.einsum("tnd,ndr->tnr", nope, uk)
            scores = torch.einsum("tnr,lr->ntl", query, latent)
        else:
            scores = torch.einsum("tnd,lnd->ntl", nope, torch.einsum("lr,ndr->lnd", latent, uk))
        scores = (scores + torch.einsum("tnp,lp->ntl", rope, k_rope)) * scale
        seen = visible(query_len, len(latent), None, latent.device)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        if request < batch.num_single:
            mixed = torch.einsum("ntl,lr->tnr", weights, latent)
            y = torch.einsum("tnr,nvr->tnv", mixed, uv)
        else:
            y = torch.einsum("ntl,lnv->tnv", weights, torch.einsum("lr,nvr->lnv", latent, uv))
        out[start:end] = y.to(out.dtype)
    return out


@op(
    cases=(
        _case("single", [1, 1, 1], [1, 17, 40], (4, 16, 8, 32, 24, 4)),
        _case("long", [7, 33], [7, 50], (4, 16, 8, 32, 24, 16)),
        _case("mixed", [1, 1, 5, 20], [3, 64, 9, 20], (2, 32, 16, 64, 16, 8)),
        _case("chunks", [1, 300, 130], [9, 420, 130], (2, 16, 8, 32, 24, 16)),
        _case("decode_40", [1] * 40, [i * 7 % 120 + 1 for i in range(40)], (4, 16, 64, 256, 16, 16)),
        _case("blocks", [1, 1, 1, 9], [1, 64, 200, 130], (4, 16, 8, 32, 24, 64)),
        _case("decode_70", [1] * 70, [i * 3 % 40 + 1 for i in range(70)], (2, 16, 8, 32, 24, 16)),
        _case("decode_1_4096", [1], [4096], (16, 128, 64, 512, 128, 64)),
        _case("decode_32_4096", [1] * 32, [4096] * 32, (16, 128, 64, 512, 128, 64)),
        _case("decode_16_1100", [1] * 16, [1100 - i for i in range(16)], (16, 128, 64, 512, 128, 64)),
        _case("decode_128_4096", [1] * 128, [4096] * 128, (16, 128, 64, 512, 128, 64)),
        _case("decode_16_4096_of_128", [1] * 16, [4096] * 16, (128, 128, 64, 512, 128, 64)),
        _case("prefill_4096", [1024, 1024], [1024, 4096], (16, 128, 64, 512, 128, 64)),
        _case("decode_32", [1] * 32, [64 * (i + 1) for i in range(32)], (16, 128, 64, 512, 128, 16)),
    ),
    tolerance={torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)},
    cost=_cost,
)
def mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """q_nope [T, N, nope], q_rope [T, N, P] (rotated), cache [num_blocks, block_size, R + P] (write_latent's layout:
    normed latent c [R], rotated k_rope [P]), w_uk [N, nope, R], w_uv [N, v, R] -> [T, N, v].

    Causal softmax of (q_nope . W_UK c + q_rope . k_rope) * scale over a request's tokens, times W_UV c. The batch's
    num_single one-token rows are computed absorbed (q W_UK against the latents themselves: MQA with keys of R + P),
    long rows naive (keys and values of every head made from the latents): the same numbers up to rounding. fp32
    throughout, rounded once. Slots that belong to no request are never read: they may hold NaN.
    """
    rank, rows = w_uk.shape[2], cache.view(-1, cache.shape[2])
    parts = [rank, rows.shape[1] - rank]
    return attend(q_nope, q_rope, lambda slots: rows[slots].split(parts, -1), w_uk, w_uv, batch, scale)
