"""The loop's body: schedule a step, execute it, update the requests, publish what they gained."""

from __future__ import annotations

import time

from deepserve.engine.admission import RequestLimits
from deepserve.engine.compiling import Compiling
from deepserve.engine.executor import Executor
from deepserve.errors import AskError
from deepserve.log import get_logger
from deepserve.messages import DraftCounts, EngineStats, NewRequest, RequestDelta, StepOutput
from deepserve.sampling.grammar import Grammars
from deepserve.scheduler.scheduler import Scheduler

log = get_logger(__name__)
MAX_FAILED_STEPS = 3  # one after another: then it is not the requests' fault


class EngineDead(RuntimeError):
    """The engine cannot go on; every request in it is lost."""


class Engine:
    """One replica: requests in, deltas out. Not thread-safe; only the executor may have a thread of its own.

    A step that raises ends the requests in it with an error and the engine goes on, up to MAX_FAILED_STEPS in a row.
    `counters` has the build's counts by row of the optimizations. `grammars` are the runner's; without them structured
    outputs are refused.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        limits: RequestLimits,
        counters: dict[str, int] | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.limits = limits
        self.grammars = grammars or Grammars(None, limits.vocab_size, ())
        self._compiling = Compiling(self.grammars)
        self._counters = counters or {}
        self._untold: list[RequestDelta] = []  # of aborts, published with the next step
        self._num_failed = 0  # steps in a row
        self._num_ahead = 0  # steps that were scheduled while another was in flight
        self._num_scheduled_tokens = 0
        self._step_time = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.scheduler.requests or self.executor.in_flight or self._untold or self._compiling.requests)

    @property
    def counters(self) -> dict[str, int]:
        """How often each optimization fired, by the name of its row."""
        scheduler = self.scheduler
        return {
            **self._counters,
            "prefix_caching": scheduler.cache.num_prefix_hits,
            "chunked_prefill": scheduler.num_chunked_steps,
            "async_scheduling": self._num_ahead,
            "speculative_decoding": scheduler.drafts.num_accepted_tokens,
        }

    def add(self, new: NewRequest) -> None:
        """Takes in a request. AskError names the field that cannot be honoured."""
        waiting, compiling = self.scheduler.requests, self._compiling.requests
        request = self.limits.admit(new, len(waiting) + len(compiling))
        if new.request_id in waiting or new.request_id in compiling:
            raise AskError(f"{new.request_id!r} is in use", field="request_id")
        if not self._compiling.add(request):
            self.scheduler.add(request)

    def abort(self, request_ids: list[str]) -> None:
        """Ends these requests; each that was there gets a last delta with finish_reason abort. Others are ignored."""
        self._untold += self._compiling.abort(request_ids) + self.scheduler.abort(request_ids)

    def step(self) -> StepOutput:
        """Schedules a step if there is one and takes in the oldest result that is due. EngineDead: see the class."""
        start = time.perf_counter()
        executor = self.executor
        deltas, self._untold = self._untold, []
        if self._compiling.requests:
            compiled, refused = self._compiling.take(not (self.scheduler.requests or executor.in_flight or deltas))
            deltas += refused
            for request in compiled:
                self.scheduler.add(request)
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            self._num_ahead += bool(executor.in_flight)
            executor.submit(scheduled)
        elif not executor.in_flight and self.scheduler.requests:
            raise EngineDead("requests are there, and none of them can be scheduled")
        if len(executor.in_flight) > (executor.depth if scheduled is not None else 0):
            deltas += self._collect()
        self._num_scheduled_tokens = scheduled.num_scheduled_tokens if scheduled is not None else 0
        self._step_time = time.perf_counter() - start
        return StepOutput(deltas, self.stats())

    def stats(self) -> EngineStats:
        """A snapshot of now."""
        scheduler = self.scheduler
        cache = scheduler.cache
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting) + len(self._compiling.requests),
            cache.usage,
            scheduler.num_steps,
            cache.num_prefix_queries,
            cache.num_prefix_hits,
            scheduler.num_preemptions,
            self._num_scheduled_tokens,
            self._step_time,
            time.time(),
            scheduler.drafts + DraftCounts(),  # a copy
            self._counters.get("kernels_compiled_while_serving", 0),
        )

    def reset_prefix_cache(self) -> None:
        """No later request finds what was cached until now. Requests that run are not touched."""
        self.scheduler.cache.reset_prefix_cache()

    def close(self) -> None:
        """Ends the threads."""
        self._compiling.close()
        self.executor.close()

    def _collect(self) -> list[RequestDelta]:
        """The oldest step's result, as what its requests gained."""
        step = self.executor.in_flight[0]
        try:
            result = self.executor.result()
        except Exception as error:
            log.exception("step %d failed", step)
            self._num_failed += 1
            if self._num_failed >= MAX_FAILED_STEPS:
                raise EngineDead(f"{self._num_failed} steps in a row failed, the last with {_text(error)}") from error
            return self.scheduler.fail_step(f"its step failed: {_text(error)}")
        self._num_failed = 0
        return self.scheduler.update(result)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
