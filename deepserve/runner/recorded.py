"""Steps of a CPU in which every request computes one token, recorded for each small number of requests and replayed.

A replay is one call for Python, however many kernels it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from deepserve.errors import AskError
from deepserve.ops.tape import Tape
from deepserve.runner.batch import Batch
from deepserve.runner.capture import Replay
from deepserve.runner.graphs import DecodeGraphs


class RecordedSteps(DecodeGraphs):
    """DecodeGraphs with the C calls of a step in the place of a CUDA graph; with every size, so nothing is padded."""

    row = "recorded_steps"

    def _batch(self, size: int) -> Batch:
        return dataclasses.replace(super()._batch(size), context_lens=_Unknown())


class TapeRecorder:
    """A GraphRecorder of a CPU. AskError where a kernel looks at values that differ from step to step."""

    def record(self, function: Callable[[], Any]) -> tuple[Replay, Any]:
        """See GraphRecorder."""
        tape = Tape()
        try:
            result = tape.record(function)
        except RuntimeError as error:
            row = RecordedSteps.row
            raise AskError(f"cannot be on: {error}", field=row, hint=f"--off {row}") from error
        return tape.replay, result

    def bare(self, tensor: torch.Tensor) -> torch.Tensor:
        """See GraphRecorder."""
        return tensor


class _Unknown(list[int]):
    """The lengths of requests to come."""

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("a kernel looks at lengths on the host")

    __getitem__ = __iter__ = __len__ = _refuse
