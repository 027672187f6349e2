"""Steps in pieces: what lies between two attentions is recorded, once for each padded number of tokens, and replayed.

vLLM's mode PIECEWISE. The attention between them sees the batch as it is, so that any mixture of rows will do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch

from deepserve.graph.pieces import BoundPiece
from deepserve.runner.batch import Batch
from deepserve.runner.capture import GraphRecorder
from deepserve.runner.padding import BatchLimits, PaddedRows


class PiecewiseGraphs:
    """`forward` for batches with more tokens than the largest size; all others run `pieces`, which compute the same.

    Tokens, positions and slots are copied to buffers and padded; padding writes to the padding block. A piece's result
    stays where the recording put it, attention reads the batch's rows of it, and writes to a buffer that all layers and
    sizes share: rows beyond the batch's hold what an earlier step left there, numbers that nobody reads. So memory
    holds what is alive at a time in one pass of the largest size.

    The result is valid until the next replay of any recording of `recorder`. counters[row] counts the steps.
    """

    row = "piecewise_graphs"

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        pieces: Sequence[BoundPiece],
        sizes: Sequence[int],
        limits: BatchLimits,
        recorder: GraphRecorder,
        counters: dict[str, int],
        device: torch.device,
    ):
        self.forward = forward
        self.pieces = pieces
        self.sizes = sorted(sizes)
        self.counters = counters
        counters[self.row] = 0
        self._recorder = recorder
        self._line: dict[int, list[Callable[[Batch, int], object]]] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._attended: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self._last_reader = {name: index for index, piece in enumerate(pieces) for name in piece.inputs}
        for index, piece in enumerate(pieces):
            if piece.attends and self._last_reader[piece.outputs[0]] != index + 1:
                raise ValueError(
                    f"{piece.outputs[0]} is read after the next piece, and its buffer is the next one's too"
                )
        most = self.sizes[-1]
        self._rows = PaddedRows(most, limits, device)
        self._table = torch.full((most, 1), limits.padding_block, dtype=torch.int32, device=device)
        self._ones = torch.ones(most, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def capture(self) -> None:
        """Records every size, the largest first: the smaller ones live in its memory."""
        for size in reversed(self.sizes):
            self._record(size)

    def __call__(self, batch: Batch) -> torch.Tensor:
        count = len(batch.positions)
        if count > self.sizes[-1]:
            return self.forward(batch)
        size = self.sizes[bisect_left(self.sizes, count)]
        self._rows.fill((batch.token_ids, batch.positions, batch.slot_mapping), size)
        for step in self._line[size]:
            step(batch, count)
        self.counters[self.row] += 1
        return self._hidden[size][:count]

    def _record(self, size: int) -> None:
        """Runs all pieces in order on rows of padding. A result is held until its last reader is recorded: then later
        recordings may take its memory, as they will when they are replayed."""
        batch = self._rows.batch(self._table[:size], self._ones[:size], 1)
        held: dict[str, torch.Tensor] = {}
        values: dict[str, torch.Tensor] = {}
        line = self._line[size] = []
        for index, piece in enumerate(self.pieces):
            inputs = [values[name] for name in piece.inputs]
            if piece.attends:
                (name,) = piece.outputs
                values[name] = self._first(piece, inputs, batch)
                line.append(partial(_attend, piece, inputs, values[name]))
            else:
                replay, results = self._recorder.record(partial(piece.function, batch, *inputs))
                held |= zip(piece.outputs, results)
                values |= {name: self._recorder.bare(held[name]) for name in piece.outputs}
                line.append(partial(_replay, replay))
                del results
            for name in piece.inputs:
                if self._last_reader[name] == index:
                    held.pop(name, None)
        self._hidden[size] = values[self.pieces[-1].outputs[0]]

    def _first(self, piece: BoundPiece, inputs: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Attention among the rows of padding; returns those rows of the buffer, made with the largest size."""
        if piece.takes_out:
            result = piece.function(batch, *inputs, None)
        else:
            result = piece.function(batch, *inputs)
        key = tuple(result.shape[1:]), result.dtype
        if key not in self._attended:
            self._attended[key] = torch.zeros_like(result, memory_format=torch.contiguous_format)
        return self._attended[key][: len(result)]


def _replay(replay: Callable[[], None], batch: Batch, count: int) -> None:
    replay()


def _attend(piece: BoundPiece, inputs: Sequence[torch.Tensor], out: torch.Tensor, batch: Batch, count: int) -> None:
    """The batch's attention, of its `count` tokens."""
    rows = [value[:count] for value in inputs]
    if piece.takes_out:
        piece.function(batch, *rows, out[:count])
    else:
        out[:count].copy_(piece.function(batch, *rows))
