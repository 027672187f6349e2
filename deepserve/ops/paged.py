"""Where a request's tokens lie in a paged cache: what the attention rooms share, and batches for their cases."""

from __future__ import annotations

import torch

from deepserve.runner.batch import Batch


def context_slots(batch: Batch, request: int) -> torch.Tensor:
    """int64 [L]: the cache slots of a request's tokens 0 .. L-1, L its context after this step."""
    length, size = batch.context_lens[request], batch.block_size
    positions = torch.arange(length, device=batch.block_table.device)
    return batch.block_table[request, positions // size].long() * size + positions % size


def visible(query_len: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [query_len, context_len]: which tokens each of the last query_len tokens sees.

    Token i sees j <= i, and with a window only the last `window` of them, itself included.
    """
    rows = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    columns = torch.arange(context_len, device=device)[None]
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


def make_batch(
    query_lens: list[int], context_lens: list[int], block_size: int, generator: torch.Generator, device: str = "cpu"
) -> tuple[Batch, int]:
    """A batch of requests with random block tables, and the blocks that its cache must have (some stay unused).

    Requests with one new token must come first. Token ids are 0.
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
        sample_idx=(starts[1:] - 1).long().to(device),
        block_size=block_size,
        num_single=next((i for i, length in enumerate(query_lens) if length > 1), len(query_lens)),
        max_query_len=max(query_lens),
        max_seq_len=max(context_lens),
        query_lens=list(query_lens),
        context_lens=list(context_lens),
    )
    return batch, num_blocks
