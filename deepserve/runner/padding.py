"""Where recordings read a batch: buffers that stay where they are, filled up with rows that concern nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepserve.runner.batch import Batch


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch of the plan can be. Rows that only fill a size up write their cache entry to block `padding_block`,
    which no request has, and to ring `padding_ring`.
    """

    block_size: int
    max_model_len: int
    padding_block: int
    padding_ring: int = 0


class PaddedRows:
    """Token ids, positions, slots and rings of up to `most` rows of one token; at first all are padding."""

    def __init__(self, most: int, limits: BatchLimits, device: torch.device):
        self._limits = limits
        self._padding = torch.zeros(4, most, dtype=torch.int64, device=device)
        self._padding[2] = limits.padding_block * limits.block_size
        self._padding[3] = limits.padding_ring
        self._rows = self._padding.clone()
        self._query_start = torch.arange(most + 1, dtype=torch.int32, device=device)

    def fill(self, given: Sequence[torch.Tensor], size: int) -> None:
        """Copies the first of the four, all of one length, and pads them up to `size`."""
        count = len(given[0])
        rows, padding = self._rows[: len(given)], self._padding[: len(given)]
        targets, sources = [row[:count] for row in rows], list(given)
        if count < size:
            targets += [row[count:size] for row in rows]
            sources += [row[count:size] for row in padding]
        torch._foreach_copy_(targets, sources)

    def batch(self, block_table: torch.Tensor, seq_lens: torch.Tensor, max_seq_len: int) -> Batch:
        """The batch of the first rows, as many as `seq_lens` has."""
        size = len(seq_lens)
        token_ids, positions, slot_mapping, ring_ids = (row[:size] for row in self._rows)
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            block_table=block_table,
            query_start=self._query_start[: size + 1],
            seq_lens=seq_lens,
            ring_ids=ring_ids,
            sample_idx=token_ids[:0],
            block_size=self._limits.block_size,
            num_single=size,
            max_query_len=1,
            max_seq_len=max_seq_len,
            query_lens=[1] * size,
            context_lens=[max_seq_len] * size,
        )
