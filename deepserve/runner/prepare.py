"""A scheduled step as tensors: NumPy on the host, one copy to the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from deepserve.runner.batch import Batch
from deepserve.runner.slots import Slots
from deepserve.scheduler.output import ScheduledRow, ScheduledStep
from deepserve.transfer import send_all


@dataclass(slots=True)
class Prepared:
    """A batch and whose it is: `rows` in the batch's order (one-token rows first), `sampled` those of them that sample.

    They do so at S places, row i of them at first[i] .. first[i + 1] - 1: where its last known token and its drafts
    stand. Of each place: the slot with its generation, the position of the new token, and the draft there (or -1).
    """

    batch: Batch
    next_idx: torch.Tensor  # int64 [T], on the device: where in the flat slots.token_ids the token after each stands
    rows: list[ScheduledRow]
    starts: np.ndarray  # int64 [B + 1]: where each row's tokens begin in the batch
    sampled: list[ScheduledRow]
    first: np.ndarray
    slots: np.ndarray  # int64 [S], like the following
    positions: np.ndarray
    drafts: np.ndarray
    generations: np.ndarray


def prepare(step: ScheduledStep, slots: Slots) -> Prepared:
    """The step's Batch. Its rows must have entered their slots and have blocks for all tokens up to their last.

    Drafts are written to where the tokens that they guess would stand.
    """
    rows = sorted(step.rows, key=lambda row: row.num_scheduled_tokens)  # those of one token first, short ones next
    for row in rows:
        if slots.request_ids[row.slot] != row.request_id:
            raise RuntimeError(f"slot {row.slot} is {slots.request_ids[row.slot]}'s, not {row.request_id}'s")
    sampled = [row for row in rows if row.samples]
    numbers = [
        (row.slot, row.num_computed_tokens, row.num_scheduled_tokens, row.samples * (1 + len(row.draft_token_ids)))
        for row in rows
    ]
    slot, computed, lengths, counts = np.array(numbers, np.int64).T
    starts = offsets(lengths)
    chosen = np.flatnonzero(counts)
    first = offsets(counts[chosen])
    # Each place by its row and its distance from the row's end: k + 1 .. 1 in a row with k drafts.
    place = np.repeat(chosen, counts[chosen])
    back = np.repeat(first[1:], counts[chosen]) - np.arange(first[-1])
    places, positions, drafts = slot[place], (computed + lengths)[place] - back + 1, np.full(len(place), -1)
    if first[-1] > len(sampled):
        drafts[back > 1] = [token_id for row in sampled for token_id in row.draft_token_ids]
        (token_ids,) = send_all(slots.token_ids.device, drafts[back > 1])
        slots.write(places[back > 1], positions[back > 1], token_ids)
    batch, next_idx = make_batch(slots, slot, computed, starts, starts[place + 1] - back)
    return Prepared(
        batch, next_idx, rows, starts, sampled, first, places, positions, drafts, slots.generation[places]
    )  # fmt: skip


def make_batch(
    slots: Slots, slot: np.ndarray, computed: np.ndarray, starts: np.ndarray, sample_idx: np.ndarray
) -> tuple[Batch, torch.Tensor]:
    """The Batch of rows that go on from `computed` [B] in these slots, and its Prepared.next_idx.

    starts [B + 1] says where each row's tokens begin; rows of one token come first.
    """
    lengths = np.diff(starts)
    contexts, num_single = computed + lengths, int((lengths == 1).sum())
    if num_single == len(slot):
        token_slot, positions = slot, computed
    else:
        token_slot = np.repeat(slot, lengths)
        positions = np.arange(starts[-1]) + np.repeat(computed - starts[:-1], lengths)
    block_size, width = slots.block_size, slots.token_ids.shape[1]
    block = positions // block_size
    slot_mapping = slots.block_table[token_slot, block] * np.int64(block_size) + (positions - block * block_size)
    max_seq_len = int(contexts.max())
    tables = slots.block_table[slot, : -(-max_seq_len // block_size)]
    device = slots.token_ids.device
    where, position, mapping, rings, sample, query_start, seq_lens, table = send_all(
        device, token_slot * width + positions, positions, slot_mapping, slots.ring_ids[slot], sample_idx,
        starts.astype(np.int32), contexts.astype(np.int32), tables,
    )  # fmt: skip
    batch = Batch(
        token_ids=slots.token_ids.view(-1).index_select(0, where).long(),
        positions=position,
        slot_mapping=mapping,
        block_table=table,
        query_start=query_start,
        seq_lens=seq_lens,
        ring_ids=rings,
        sample_idx=sample,
        block_size=block_size,
        num_single=num_single,
        max_query_len=int(lengths.max()),
        max_seq_len=max_seq_len,
        query_lens=lengths.tolist(),
        context_lens=contexts.tolist(),
    )
    return batch, where + 1


def offsets(counts: np.ndarray) -> np.ndarray:
    """int64 [B + 1]: where each of B pieces begins, and where the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
