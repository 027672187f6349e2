"""Whole steps recorded: the forward of batches of one-token rows, once for each padded size, and replayed.

vLLM's modes FULL_DECODE_ONLY and, with mixed steps taken apart, FULL.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from deepserve.ops.paged import one_token_rows
from deepserve.runner.batch import Batch
from deepserve.runner.capture import GraphRecorder, Replay
from deepserve.runner.padding import BatchLimits, PaddedRows

Forward = Callable[[Batch], torch.Tensor]


class DecodeGraphs:
    """`forward` for batches whose rows all have one token, as long as there are no more than the largest size: it is
    recorded. All other batches are `otherwise`'s.

    The result of a replay is valid until the next one. counters[row] counts them.
    """

    row = "cuda_graphs"

    def __init__(
        self,
        forward: Forward,
        otherwise: Forward,
        sizes: Sequence[int],
        limits: BatchLimits,
        recorder: GraphRecorder,
        counters: dict[str, int],
        device: torch.device,
    ):
        self.forward = forward
        self.otherwise = otherwise
        self.sizes = sorted(sizes)
        self.limits = limits
        self.counters = counters
        counters[self.row] = 0
        self._recorder = recorder
        self._recorded: dict[int, tuple[Replay, torch.Tensor]] = {}
        most, width = self.sizes[-1], -(-limits.max_model_len // limits.block_size)
        self._rows = PaddedRows(most, limits, device)
        self._seq_lens = torch.ones(most, dtype=torch.int32, device=device)
        self._ones = self._seq_lens.clone()
        self._table = torch.full((most, width), limits.padding_block, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def capture(self) -> None:
        """Records every size, the largest first: the smaller ones live in its memory."""
        for size in reversed(self.sizes):
            self._recorded[size] = self._recorder.record(self._step(self._batch(size)))

    def __call__(self, batch: Batch) -> torch.Tensor:
        count = len(batch.query_lens)
        if batch.num_single < count or count > self.sizes[-1]:
            return self.otherwise(batch)
        size = self.sizes[bisect_left(self.sizes, count)]
        self._rows.fill((batch.token_ids, batch.positions, batch.slot_mapping, batch.ring_ids), size)
        torch._foreach_copy_(
            [self._seq_lens[:count], self._seq_lens[count:size]], [batch.seq_lens, self._ones[count:size]]
        )
        self._table[:count, : batch.block_table.shape[1]].copy_(batch.block_table)
        replay, hidden = self._recorded[size]
        replay()
        self.counters[self.row] += 1
        return hidden[:count]

    def _step(self, batch: Batch) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            batch.derived.clear()  # worked out again in every step
            return self.forward(batch)

        return step

    def _batch(self, size: int) -> Batch:
        """A batch of that size on the buffers that replays read."""
        return self._rows.batch(self._table[:size], self._seq_lens[:size], self.limits.max_model_len)


class MixedGraphs:
    """`graphs` for mixed steps too, as long as their tokens are no more than its largest size: each token becomes a row
    of its own. The attention of a long prompt is slower so: every token reads its whole context.
    """

    row = "mixed_graphs"

    def __init__(self, graphs: DecodeGraphs, counters: dict[str, int]):
        self.graphs = graphs
        self.counters = counters
        counters[self.row] = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        if batch.num_single < len(batch.query_lens) and len(batch.positions) <= self.graphs.sizes[-1]:
            self.counters[self.row] += 1
            batch = one_token_rows(batch)
        return self.graphs(batch)
