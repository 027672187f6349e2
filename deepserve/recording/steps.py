"""Times the parts of every step. Nothing in the loop knows of it: what is timed is put in the place of what is not."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch

from deepserve.ops.op import Kernel
from deepserve.recording.timeline import Timeline
from deepserve.scheduler.output import ScheduledStep

if TYPE_CHECKING:
    from deepserve.engine.engine import Engine
    from deepserve.runner.model_runner import ModelRunner


class StepTrace:
    """Lane engine: schedule, wait (for a step's result), update. Lane runner: step = prepare (rows enter their slots,
    the batch is made), forward, sample (with logits, drafts, what is written back), and host gap: the time from one
    step to the next in which requests were there and the runner had nothing to do. Beside a GPU that is no loss and
    called idle. Lane device, on a GPU, by CUDA events: forward from its first kernel to its last, and host gap from the
    last kernel of a step to the first of the next forward, copies of its inputs included.

    `with_ops`: calls of ops inside forward and sample too, on a GPU on its own lane.
    """

    def __init__(self, timeline: Timeline, device: torch.device, with_ops: bool):
        self.timeline = timeline
        self._with_ops = with_ops
        self._device = _DeviceClock(timeline) if device.type == "cuda" else None
        self._started = False
        self._begin = self._forward_end = 0
        self._end: int | None = None  # of the step before, while there are requests

    def watch(self, kernel: Kernel) -> Kernel:
        """The kernel, timed if ops are wanted."""
        if not self._with_ops:
            return kernel
        function, name = kernel.function, kernel.op

        @functools.wraps(function)
        def timed(*args: Any) -> Any:
            if not self._started:
                return function(*args)
            if self._device is not None:
                return self._device.span(name, function, *args)
            start = perf_counter_ns()
            result = function(*args)
            self.timeline.add("runner", name, start, perf_counter_ns())
            return result

        return dataclasses.replace(kernel, function=timed)

    def start(self, engine: Engine, runner: ModelRunner) -> None:
        """Puts itself in place, once everything is built and warm."""
        self._started = True
        scheduler, executor = engine.scheduler, engine.executor
        for owner, method, replaced in (
            (scheduler, "add", functools.partial(self._add, scheduler.add, scheduler.requests)),
            (scheduler, "schedule", functools.partial(self._timed, "engine", "schedule", scheduler.schedule)),
            (scheduler, "update", functools.partial(self._timed, "engine", "update", scheduler.update)),
            (executor, "result", functools.partial(self._timed, "engine", "wait", executor.result)),
            (runner, "execute", functools.partial(self._execute, runner.execute)),
            (runner, "forward", functools.partial(self._forward, runner.forward)),
            (runner, "logits", functools.partial(self._timed, "runner", "logits", runner.logits)),
            (engine, "close", functools.partial(self._close, engine.close)),
        ):
            setattr(owner, method, replaced)

    def _timed(self, lane: str, name: str, function: Callable[..., Any], *args: Any) -> Any:
        start = perf_counter_ns()
        try:
            return function(*args)
        finally:
            self.timeline.add(lane, name, start, perf_counter_ns())

    def _add(self, add: Callable[..., Any], requests: dict[str, Any], request: Any) -> None:
        if not requests:  # until now there was nothing to do
            self._end = None
            if self._device is not None:
                self._device.end = None
        add(request)

    def _execute(self, execute: Callable[[ScheduledStep], Any], step: ScheduledStep) -> Any:
        self._begin = begin = perf_counter_ns()
        if self._end is not None:
            self.timeline.add("runner", "host gap" if self._device is None else "idle", self._end, begin)
        try:
            return execute(step)
        finally:
            self._end = end = perf_counter_ns()
            if self._device is not None:
                self._device.end_step()
            self.timeline.add("runner", "sample", max(self._forward_end, begin), end)
            long = sum(row.num_scheduled_tokens > 1 + len(row.draft_token_ids) for row in step.rows)
            args = {"step": step.step, "requests": len(step.rows), "tokens": step.num_scheduled_tokens}
            self.timeline.add("runner", "step", begin, end, **args, prefills=long)

    def _forward(self, forward: Callable[[Any], Any], batch: Any) -> Any:
        start = perf_counter_ns()
        self.timeline.add("runner", "prepare", self._begin, start)
        try:
            return forward(batch) if self._device is None else self._device.span("forward", forward, batch)
        finally:
            self._forward_end = perf_counter_ns()
            self.timeline.add("runner", "forward", start, self._forward_end)

    def _close(self, close: Callable[[], None]) -> None:
        close()
        if self._device is not None:
            self._device.settle(wait=True)
        self.timeline.close()


class _DeviceClock:
    """Spans of the device's own time. Each forward is placed by its distance from the one before it: an event's clock
    has 32 bits, and a long run would leave it few for the spans themselves.
    """

    def __init__(self, timeline: Timeline):
        self.timeline = timeline
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.end: torch.cuda.Event | None = None  # of the step before, while there are requests
        self._before = torch.cuda.Event(enable_timing=True)
        self._before.record()
        self._before.synchronize()
        self._at = perf_counter_ns()

    def span(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Calls it between two events."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        if name == "forward" and self.end is not None:
            self._pending.append(("host gap", self.end, begin))
        result = function(*args)
        end.record()
        self._pending.append((name, begin, end))
        self.settle()
        return result

    def end_step(self) -> None:
        """All of a step has been launched."""
        self.end = torch.cuda.Event(enable_timing=True)
        self.end.record()

    def settle(self, wait: bool = False) -> None:
        """Adds the spans that are over; with `wait` all of them."""
        if wait:
            torch.cuda.synchronize()
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.popleft()
            start = self._at + int(self._before.elapsed_time(begin) * 1e6)
            self.timeline.add("device", name, start, start + int(begin.elapsed_time(end) * 1e6))
            if name == "forward":
                self._before, self._at = begin, start
