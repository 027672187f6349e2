"""Where a request's tokens lie in a paged cache: what the attention rooms share, and batches for their cases."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from deepserve.runner.batch import Batch

GATHER_BYTES = 8 << 20  # what a CPU kernel gathers at a time: it is read again from the last-level cache
SHORT_TOKENS = 9  # new tokens of a row that is cheaper as so many rows of one: a token and its drafts
SCORES_BYTES = 2 << 20  # of a chunk of queries of a long row


def context_slots(batch: Batch, request: int, ratio: int = 1) -> torch.Tensor:
    """int64 [L // ratio]: the cache slots of a request's entries, L its context after this step (kept in derived).

    An entry stands for `ratio` tokens: a block holds block_size // ratio of them.
    """
    key = ("context_slots", request, ratio)
    if key not in batch.derived:
        size = batch.block_size // ratio
        entries = torch.arange(batch.context_lens[request] // ratio, device=batch.block_table.device)
        batch.derived[key] = batch.block_table[request, entries // size].long() * size + entries % size
    slots: torch.Tensor = batch.derived[key]
    return slots


def chosen_slots(batch: Batch, tokens: slice, chosen: torch.Tensor, ratio: int = 1) -> torch.Tensor:
    """int64, like `chosen` [t, K]: the cache slots of the entries that each of those tokens of the batch chose of its
    request's; -1 (none) becomes the request's first entry, which is written."""
    size, entries = batch.block_size // ratio, chosen.long().clamp(min=0)
    blocks = batch.block_table[token_requests(batch)[tokens, None], entries // size]
    return blocks.long() * size + entries % size


def token_requests(batch: Batch) -> torch.Tensor:
    """int64 [T]: whose each token is, without synchronisation (kept in derived)."""
    if "token_requests" not in batch.derived:
        lengths = batch.query_start.diff().long()
        rows = torch.arange(len(lengths), device=lengths.device)
        batch.derived["token_requests"] = rows.repeat_interleave(lengths, output_size=len(batch.positions))
    requests: torch.Tensor = batch.derived["token_requests"]
    return requests


@dataclass(frozen=True, slots=True)
class LongRows:
    """Some neighbouring long rows of a batch with their contexts one after the other, or a slice of one row's context.

    slots int64 [C]: the cache slots of those C tokens. query_start int32 [rows + 1]: where the rows' tokens begin in
    the batch; context_start int32 [rows + 1]: where their contexts do among the C; seq_lens int32 [rows]: how long the
    contexts are, of which `offset` tokens come before the slice. tokens: the rows' in the batch.
    """

    slots: torch.Tensor
    query_start: torch.Tensor
    context_start: torch.Tensor
    seq_lens: torch.Tensor
    offset: int
    tokens: slice
    max_query_len: int


def long_rows(batch: Batch, most: int) -> list[list[LongRows]]:
    """The batch's long rows, as many at a time as have `most` tokens of context; a row with more in slices, which are
    a list. Worked out once a step, with no synchronisation (layers share it through batch.derived).
    """
    key = ("long_rows", most)
    if key not in batch.derived:
        groups: list[list[int]] = []
        for request in range(batch.num_single, len(batch.query_lens)):
            length = batch.context_lens[request]
            if groups and sum(batch.context_lens[one] for one in groups[-1]) + length <= most:
                groups[-1].append(request)
            else:
                groups.append([request])
        batch.derived[key] = [_slices(batch, group[0], group[-1] + 1, most) for group in groups]
    found: list[list[LongRows]] = batch.derived[key]
    return found


def _slices(batch: Batch, first: int, last: int, most: int) -> list[LongRows]:
    """Rows first .. last - 1: whole, or the only one in slices of `most`."""
    lengths, device, size = batch.context_lens[first:last], batch.block_table.device, batch.block_size
    table, seq_lens = batch.block_table[first:last].long(), batch.seq_lens[first:last]
    query_start = batch.query_start[first : last + 1].clone()
    begin = sum(batch.query_lens[:first])
    tokens = slice(begin, begin + sum(batch.query_lens[first:last]))
    longest, total = max(batch.query_lens[first:last]), sum(lengths)
    if total <= most:
        ends = seq_lens.cumsum(0, dtype=torch.int32)
        starts = ends - seq_lens
        row = torch.repeat_interleave(torch.arange(last - first, device=device), seq_lens, output_size=total)
        positions = torch.arange(total, device=device) - starts[row]
        slots = table[row, positions // size] * size + positions % size
        context_start = torch.cat((starts[:1], ends))
        return [LongRows(slots, query_start, context_start, seq_lens.clone(), 0, tokens, longest)]
    slices = []
    for offset in range(0, total, most):
        positions = torch.arange(offset, min(offset + most, total), device=device)
        slots = table[0, positions // size] * size + positions % size
        context_start = torch.arange(2, dtype=torch.int32, device=device) * len(positions)
        slices.append(LongRows(slots, query_start, context_start, seq_lens.clone(), offset, tokens, longest))
    return slices


def taken_apart(batch: Batch) -> Batch:
    """The same tokens, those of leading rows with at most SHORT_TOKENS as rows of one token (kept in derived)."""
    lengths = batch.query_lens
    count = next((i for i, length in enumerate(lengths) if length > SHORT_TOKENS), len(lengths))
    if count == batch.num_single:
        return batch
    if "taken_apart" not in batch.derived:
        tokens = sum(lengths[:count])
        times = torch.tensor(lengths[:count] + [1] * (len(lengths) - count), device=batch.block_table.device)
        ends = batch.query_start[count:].to(times.device)
        contexts = [c - q + i + 1 for q, c in zip(lengths[:count], batch.context_lens) for i in range(q)]
        batch.derived["taken_apart"] = replace(
            batch,
            block_table=batch.block_table.repeat_interleave(times, 0),
            query_start=torch.cat((torch.arange(tokens, device=ends.device, dtype=ends.dtype), ends)),
            seq_lens=torch.cat(((batch.positions[:tokens] + 1).int(), batch.seq_lens[count:])),
            ring_ids=batch.ring_ids.repeat_interleave(times),
            num_single=tokens,
            query_lens=[1] * tokens + lengths[count:],
            context_lens=contexts + batch.context_lens[count:],
            derived={},
        )
    found: Batch = batch.derived["taken_apart"]
    return found


def single_rows(batch: Batch) -> Batch:
    """The batch itself where each row is one token, else its one_token_rows (kept in derived)."""
    if batch.num_single == len(batch.query_lens):
        return batch
    if "single_rows" not in batch.derived:
        batch.derived["single_rows"] = one_token_rows(batch)
    found: Batch = batch.derived["single_rows"]
    return found


def one_token_rows(batch: Batch) -> Batch:
    """The same tokens, each as a row of its own with its request's blocks and the context up to itself; without
    synchronisation. The longest context of all stands for each on the host."""
    requests, count = token_requests(batch), len(batch.positions)
    return replace(
        batch,
        block_table=batch.block_table.index_select(0, requests),
        query_start=torch.arange(count + 1, dtype=torch.int32, device=requests.device),
        seq_lens=(batch.positions + 1).int(),
        ring_ids=batch.ring_ids.index_select(0, requests),
        num_single=count,
        max_query_len=1,
        query_lens=[1] * count,
        context_lens=[batch.max_seq_len] * count,
        derived={},
    )


def visible(query_len: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [query_len, context_len]: which tokens each of the last query_len tokens sees.

    Token i sees j <= i, and with a window only the last `window` of them, itself included.
    """
    rows = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    columns = torch.arange(context_len, device=device)[None]
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [H, G, Lq, D] of the last Lq tokens, k [H, L, D], v [H, L, Dv] of all -> [H, G, Lq, Dv]; for a CPU.

    A chunk of queries at a time against the keys up to its last: scores stay in the cache of the core, and most of what
    the mask would hide is never computed. Scores are rounded to the dtype, as transformers' eager attention does.
    """
    heads, groups, query_len, dim = q.shape
    first = k.shape[1] - query_len
    size = min(max(SCORES_BYTES // (heads * groups * k.shape[1] * q.element_size()), 32), 128)
    hidden = torch.ones(size, size, dtype=torch.bool).triu_(1)
    nothing = q.new_zeros(1, 1, 1)
    out = q.new_empty(heads, groups, query_len, v.shape[2])
    for start in range(0, query_len, size):
        rows = min(size, query_len - start)
        seen = first + start + rows
        chunk = q[:, :, start : start + rows].reshape(heads, groups * rows, dim)
        scores = torch.baddbmm(nothing, chunk, k[:, :seen].transpose(1, 2), beta=0, alpha=scale)
        scores = scores.view(heads, groups, rows, seen)
        scores[..., seen - rows :].masked_fill_(hidden[:rows, :rows], -torch.inf)
        weights = scores.softmax(-1).view(heads, groups * rows, seen)
        out[:, :, start : start + rows] = torch.bmm(weights, v[:, :seen]).view(heads, groups, rows, -1)
    return out


@dataclass(frozen=True, slots=True)
class Group:
    """One-token requests of similar context, padded to the longest: what is gathered and multiplied at a time.

    requests: int64 [b] rows of the batch, None where these are all of its one-token rows in order. slots: int64
    [b * L], padding repeats a request's last token, so that it is finite. mask: additive [b, 1, L], -inf on padding.
    """

    requests: torch.Tensor | None
    slots: torch.Tensor
    mask: torch.Tensor


def decode_groups(batch: Batch, window: int | None, entry_bytes: int, dtype: torch.dtype) -> list[Group]:
    """The batch's one-token requests in groups, worked out once a step (layers share them through batch.derived)."""
    key = ("decode_groups", window, entry_bytes, dtype)
    if key not in batch.derived:
        groups = [_group(batch, members, window, dtype) for members in _alike(batch, window, entry_bytes)]
        batch.derived[key] = groups
    found: list[Group] = batch.derived[key]
    return found


def _alike(batch: Batch, window: int | None, entry_bytes: int) -> list[list[int]]:
    """Requests split so that padding at most doubles a group's work and its entries fit into GATHER_BYTES."""
    lengths = [min(length, window or length) for length in batch.context_lens[: batch.num_single]]
    if lengths and max(lengths) * len(lengths) <= min(GATHER_BYTES // entry_bytes, 2 * sum(lengths)):
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for request in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[groups[-1][0]] if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest * entry_bytes <= GATHER_BYTES
        if fits and longest <= 2 * lengths[request]:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def _group(batch: Batch, members: list[int], window: int | None, dtype: torch.dtype) -> Group:
    requests = None if members == list(range(batch.num_single)) else torch.tensor(members)
    table = batch.block_table[: batch.num_single] if requests is None else batch.block_table[requests]
    lengths = torch.tensor([batch.context_lens[member] for member in members])[:, None]
    starts = torch.zeros_like(lengths) if window is None else (lengths - window).clamp(min=0)
    positions = starts + torch.arange(int((lengths - starts).max()))
    mask = torch.zeros(positions.shape, dtype=dtype).masked_fill_(positions >= lengths, -torch.inf)
    positions = torch.minimum(positions, lengths - 1)
    blocks = table.long().gather(1, positions // batch.block_size)
    slots = blocks * batch.block_size + positions % batch.block_size
    return Group(requests, slots.flatten(), mask.unsqueeze(1))


def make_batch(
    query_lens: list[int], context_lens: list[int], block_size: int, generator: torch.Generator, device: str = "cpu"
) -> tuple[Batch, int]:
    """A batch of requests with random block tables, and the blocks that its cache must have (some stay unused).

    Requests with one new token must come first. Token ids are 0. Rings are some of B + 1, in any order.
    """
    counts = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(counts) + 3
    shuffled = torch.randperm(num_blocks, generator=generator).int()
    table = torch.full((len(counts), max(counts)), int(shuffled[-1]), dtype=torch.int32)
    taken = 0
    for row, count in zip(table, counts):
        row[:count] = shuffled[taken : taken + count]
        taken += count
    spans = [torch.arange(c - q, c) for q, c in zip(query_lens, context_lens)]
    slots = [table[i, span // block_size].long() * block_size + span % block_size for i, span in enumerate(spans)]
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    batch = Batch(
        token_ids=torch.zeros(sum(query_lens), dtype=torch.int64, device=device),
        positions=torch.cat(spans).to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_table=table.to(device),
        query_start=starts.to(device),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        ring_ids=torch.randperm(len(counts) + 1, generator=generator)[1:].to(device),
        sample_idx=(starts[1:] - 1).long().to(device),
        block_size=block_size,
        num_single=next((i for i, length in enumerate(query_lens) if length > 1), len(query_lens)),
        max_query_len=max(query_lens),
        max_seq_len=max(context_lens),
        query_lens=list(query_lens),
        context_lens=list(context_lens),
    )
    return batch, num_blocks
