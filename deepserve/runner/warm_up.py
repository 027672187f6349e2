"""What is paid once is paid before the first request: lazy initialisation, and a GPU's kernels for steps of any size.

What stays in the cache's first blocks is overwritten before anybody reads it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepserve.runner.batch import Batch
from deepserve.runner.model_runner import ModelRunner
from deepserve.runner.padding import BatchLimits, PaddedRows
from deepserve.sampling_params import SamplingParams
from deepserve.scheduler.output import NewRow, ScheduledRow, ScheduledStep

NUM_TOKENS = 32


def warm_up(runner: ModelRunner, max_tokens: int) -> None:
    """A prefill and a decode step of a request of up to NUM_TOKENS tokens; slot 0 is left as it was found."""
    count = max(1, min(NUM_TOKENS, max_tokens))
    decodes = max_tokens > count
    blocks = list(range(-(-(count + decodes) // runner.slots.block_size)))
    new = NewRow([0] * count, count, SamplingParams(seed=0, top_p=0.9), ())
    runner.execute(ScheduledStep(0, [ScheduledRow("warm-up", 0, count, 0, blocks, new, True)], [], count))
    if decodes:
        runner.execute(ScheduledStep(1, [ScheduledRow("warm-up", 0, 1, count, [], None, True)], [], 1))
    runner.slots.release(0)


@torch.inference_mode()
def warm_up_sizes(runner: ModelRunner, limits: BatchLimits, max_rows: int, max_tokens: int) -> None:
    """Steps in which kernels choose other shapes, so that none is compiled later: of up to max_rows rows of one token,
    alone and beside a prompt, of prompts of up to max_tokens tokens, and after the longest context; logits and greedy
    tokens of as many rows."""
    device = runner.slots.token_ids.device
    rows = PaddedRows(max_rows, limits, device)
    for size in _sizes(max_rows):
        table = torch.zeros(size, 1, dtype=torch.int32, device=device)
        seq_lens = torch.ones(size, dtype=torch.int32, device=device)
        hidden = runner.forward(rows.batch(table, seq_lens, 1))
        runner.sampler.most_probable(runner.logits(hidden))
    longest = limits.max_model_len
    count = min(NUM_TOKENS, max_tokens, longest - 1)
    for size in _sizes(min(max_rows - 1, max_tokens - count)) if count > 1 else ():
        runner.forward(_prompts([1] * size + [count], 0, limits, device))
    for size in _sizes(max_tokens):
        whole, rest = divmod(size, longest)
        runner.forward(_prompts([longest] * whole + [rest] * (rest > 1), 0, limits, device))
    if count > 1:
        runner.forward(_prompts([count], longest - count, limits, device))


def _sizes(limit: int) -> Iterator[int]:
    """The powers of two below `limit`, and it: kernels choose by these, or by numbers of tiles of these."""
    size = 1
    while size < limit:
        yield size
        size *= 2
    if limit > 0:
        yield limit


def _prompts(lengths: list[int], context: int, limits: BatchLimits, device: torch.device) -> Batch:
    """Requests with so many new tokens, ones first, after a context of that many, all of them in block 0."""
    if not lengths:
        lengths = [1]
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths]) + context
    zeros, ends = torch.zeros_like(positions), [length + context for length in lengths]
    return Batch(
        token_ids=zeros,
        positions=positions,
        slot_mapping=positions % limits.block_size,
        block_table=torch.zeros(len(ends), -(-max(ends) // limits.block_size), dtype=torch.int32, device=device),
        query_start=starts.int(),
        seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        ring_ids=torch.zeros(len(ends), dtype=torch.int64, device=device),
        sample_idx=zeros[:0],
        block_size=limits.block_size,
        num_single=lengths.count(1),
        max_query_len=max(lengths),
        max_seq_len=max(ends),
        query_lens=lengths,
        context_lens=ends,
    )
