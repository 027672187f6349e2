"""The asyncio door to an engine in a process of its own. (In one's own process, call the Engine itself.)"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deepserve.errors import AskError
from deepserve.log import get_logger
from deepserve.messages import (
    AbortRequests,
    Control,
    ControlDone,
    EngineFailed,
    EngineStats,
    NewRequest,
    Phase,
    Ready,
    RequestDelta,
    StepOutput,
)

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from deepserve.engine.processes import Build, OnPhase
    from deepserve.engine.transport import ClientEnd
    from deepserve.plan import Plan

log = get_logger(__name__)

OnDelta = Callable[[RequestDelta], None]
LAST_WORDS_S = 0.3  # for what an engine said before it died to arrive
EXIT_S = 5.0  # for an engine that was told to stop


class ProcessClient:
    """An engine in a process of its own. All methods belong to one event loop.

    `stats` is the newest snapshot and `last_heartbeat` the time (time.time) when the engine was last heard of: after
    every step, or every second while it is idle. `alive` turns False for good when the process has ended; then every
    request that waits has got a last delta with finish_reason error. `on_stats` is called with every snapshot.
    """

    def __init__(self, on_stats: Callable[[EngineStats], None] | None = None) -> None:
        self.stats: EngineStats | None = None
        self.last_heartbeat = 0.0
        self.alive = False
        self._on_stats = on_stats
        self._on_phase: OnPhase | None = None
        self._listeners: dict[str, OnDelta] = {}
        self._answers: dict[int, asyncio.Future[ControlDone]] = {}
        self._tickets = itertools.count(1)
        self._failure: EngineFailed | None = None
        self._process: BaseProcess | None = None
        self._end: ClientEnd | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, plan: Plan, on_phase: OnPhase | None = None, build: Build | None = None) -> None:
        """Starts the process and waits until it takes requests. `on_phase(name, seconds)` hears of every phase.

        AskError where the plan cannot be built, RuntimeError where the process dies before it is ready.
        """
        from deepserve.engine.processes import start_engine_process
        from deepserve.engine.transport import ClientEnd

        self._on_phase = on_phase
        self._end = ClientEnd()
        self._process = start_engine_process(plan, self._end.directory, build)
        atexit.register(self._process.kill)  # before multiprocessing's own exit, which would wait for it
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._exited = asyncio.Event()
        loop.add_reader(self._process.sentinel, self._on_exit)
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._mourn())]
        await asyncio.shield(self._ready)

    def add(self, new: NewRequest, on_delta: OnDelta) -> None:
        """Sends a request; `on_delta` gets every delta, the last with a finish_reason. AskError 503: no engine."""
        if not self.alive or self._end is None:
            raise AskError("the engine is not running", hint="see the log", status=503, code="engine_dead")
        if new.request_id in self._listeners:
            raise AskError(f"{new.request_id!r} is in use", field="request_id")
        self._end.send(new)
        self._listeners[new.request_id] = on_delta

    def abort(self, request_ids: list[str]) -> None:
        """Ends these requests and listens to them no longer. Those that have ended are ignored."""
        found = [request_id for request_id in request_ids if self._listeners.pop(request_id, None)]
        if found and self.alive and self._end is not None:
            with contextlib.suppress(AskError):  # it ends, and they with it
                self._end.send(AbortRequests(found))

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False if the engine has died."""
        return (await self._ask("reset_prefix_cache")).ok

    async def shutdown(self, drain: bool = False, timeout: float = 30.0) -> None:
        """Ends the process: at once, or with `drain` after its requests, for which it has `timeout` seconds.

        Requests that are left get a last delta with finish_reason abort. A process that does not end is killed.
        """
        if self._process is None:
            return
        if self.alive:
            with contextlib.suppress(TimeoutError):
                if drain:
                    await asyncio.wait_for(self._ask("drain"), timeout)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ask("shutdown"), EXIT_S)
                await asyncio.wait_for(self._exited.wait(), EXIT_S)
        if self._process.is_alive():
            self._process.kill()
        await self._exited.wait()
        self._end_requests("abort", None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        atexit.unregister(self._process.kill)
        self._process.join()
        self._process.close()
        if self._end is not None:
            self._end.close()
        self._process, self._end, self.alive = None, None, False

    async def _ask(self, verb: str) -> ControlDone:
        if not self.alive or self._end is None:
            return ControlDone(0, False, "the engine is not running")
        ticket = next(self._tickets)
        answer = self._answers[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._end.send(Control(verb, ticket))
            return await answer
        except AskError as error:
            return ControlDone(ticket, False, error.message)
        finally:
            del self._answers[ticket]

    async def _listen(self) -> None:
        """Takes in what the engine says, for as long as there is a socket."""
        assert self._end is not None
        while True:
            message = await self._end.receive()
            self.last_heartbeat = time.time()
            if isinstance(message, StepOutput):
                self._take(message)
            else:
                self._take_other(message)

    def _take(self, output: StepOutput) -> None:
        self.stats = output.stats
        if self._on_stats is not None:
            self._on_stats(output.stats)
        for delta in output.deltas:
            request_id = delta.request_id
            listener = self._listeners.get(request_id)
            if listener is None:
                continue  # aborted here, before the engine knew
            if delta.finish_reason is not None:
                del self._listeners[request_id]
            _tell(listener, delta)

    def _take_other(self, message: Any) -> None:
        if isinstance(message, Phase):
            if self._on_phase is not None:
                self._on_phase(message.name, message.seconds)
        elif isinstance(message, Ready):
            self.stats = message.stats
            self.alive = True
            if not self._ready.done():
                self._ready.set_result(None)
        elif isinstance(message, ControlDone):
            answer = self._answers.get(message.ticket)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, EngineFailed):
            self._failure = message

    def _on_exit(self) -> None:
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self.alive = False
        self._exited.set()

    async def _mourn(self) -> None:
        """When the process has ended, tells everybody who still waits for it."""
        await self._exited.wait()
        await asyncio.sleep(LAST_WORDS_S)
        assert self._process is not None
        failure = self._failure or EngineFailed(f"the engine process ended with exit code {self._process.exitcode}")
        if not self._ready.done():
            if failure.asked:
                self._ready.set_exception(AskError(failure.reason, field=failure.field, hint=failure.hint))
            else:
                self._ready.set_exception(RuntimeError(failure.reason))
            self._ready.exception()  # seen, even where the start was cancelled
        self._end_requests("error", failure.reason)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(ControlDone(0, False, failure.reason))

    def _end_requests(self, reason: str, error: str | None) -> None:
        listeners, self._listeners = self._listeners, {}
        if listeners and error:
            log.error("%d requests are lost: %s", len(listeners), error)
        for request_id, listener in listeners.items():
            _tell(listener, RequestDelta(request_id, [], finish_reason=reason, error=error))


def _tell(listener: OnDelta, delta: RequestDelta) -> None:
    """One listener's failure is not the others'."""
    try:
        listener(delta)
    except Exception:
        log.exception("request %s: its listener failed", delta.request_id)
