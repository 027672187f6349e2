"""What is paid once is paid before the first request: lazy initialisation, and a GPU's kernels for steps of any size.

What stays in the cache's first blocks is overwritten before anybody reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from deepserve.ops.paged import make_batch
from deepserve.runner.batch import Batch
from deepserve.runner.model_runner import ModelRunner
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
def warm_up_sizes(runner: ModelRunner, max_tokens: int) -> None:
    """Steps in which kernels choose other shapes, so that none is compiled later: of up to as many rows of one token as
    there are slots, alone and beside a prompt, of prompts of up to max_tokens tokens, and after the longest context;
    logits and greedy tokens of as many rows."""
    num_slots, longest = runner.slots.token_ids.shape[0], runner.slots.token_ids.shape[1] - 1
    max_rows, count = min(num_slots, max_tokens), min(NUM_TOKENS, max_tokens, longest - 1)
    for size in _sizes(max_rows):
        hidden = runner.forward(_batch(runner, [1] * size))
        runner.sampler.most_probable(runner.logits(hidden))
    for size in _sizes(min(max_rows - 1, max_tokens - count)) if count > 1 else ():
        runner.forward(_batch(runner, [1] * size + [count]))
    for size in _sizes(max_tokens):
        whole, rest = divmod(size, longest)
        runner.forward(_batch(runner, [longest] * whole + [rest] * (rest > 1) or [1]))
    if count > 1:
        runner.forward(_batch(runner, [count], longest - count))


def _sizes(limit: int) -> Iterator[int]:
    """The powers of two below `limit`, and it: kernels choose by these, or by numbers of tiles of these."""
    size = 1
    while size < limit:
        yield size
        size *= 2
    if limit > 0:
        yield limit


def _batch(runner: ModelRunner, lengths: list[int], context: int = 0) -> Batch:
    """Requests with so many new tokens, ones first, after a context of that many, all of them in block 0."""
    slots, ends = runner.slots, [length + context for length in lengths]
    batch, _ = make_batch(lengths, ends, slots.block_size, torch.Generator(), str(slots.token_ids.device))
    return replace(
        batch,
        slot_mapping=batch.positions % slots.block_size,
        block_table=torch.zeros_like(batch.block_table),
        ring_ids=torch.zeros_like(batch.ring_ids),
    )
