"""The engine's own process: starts, serves messages and steps until it is told to stop or its parent is gone."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from deepserve.engine.engine import Engine
from deepserve.engine.garbage import Garbage
from deepserve.engine.transport import EngineEnd
from deepserve.errors import AskError
from deepserve.log import get_logger, setup
from deepserve.messages import (
    AbortRequests,
    Control,
    ControlDone,
    EngineFailed,
    NewRequest,
    Phase,
    Ready,
    RequestDelta,
    StepOutput,
)

if TYPE_CHECKING:
    from deepserve.plan import Plan

log = get_logger(__name__)
OnPhase = Callable[[str, float], None]  # name of a phase of the start that is over, and its seconds
Build = Callable[["Plan", OnPhase], Engine]
HEARTBEAT_S = 1.0


def start_engine_process(plan: Plan, directory: str, build: Build | None = None) -> multiprocessing.process.BaseProcess:
    """Starts a fresh interpreter that runs `engine_process`; the plan reaches it through multiprocessing's own pipe.

    `build` is deepserve.build.build_engine unless another is given.
    """
    level = logging.getLevelName(logging.getLogger("deepserve").getEffectiveLevel()).lower()
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=engine_process, args=(plan, directory, level, build), name="deepserve-engine", daemon=True
    )
    resource_tracker.ensure_running()  # its start would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: a terminal sends it to all, and the parent
    process.start()  # says what is to be done
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return process


def engine_process(plan: Plan, directory: str, log_level: str, build: Build | None) -> None:
    """The whole life of an engine process; ends with exit code 0 when told to stop, 1 when the engine cannot go on."""
    setup(log_level, "engine")
    threading.Thread(target=_watch_parent, args=(directory,), name="watch-parent", daemon=True).start()
    end = EngineEnd(directory)
    try:
        if build is None:
            from deepserve.build import build_engine  # it brings torch, which the server does without

            build = build_engine
        engine = build(plan, lambda name, seconds: end.send(Phase(name, seconds)))
        gc.collect()  # what is left stays
        with Garbage() as garbage:
            end.send(Ready(engine.stats()))
            EngineLoop(engine, end, garbage).run()
    except AskError as error:
        end.send(EngineFailed(error.message, True, error.field, error.hint))
        exit_code = 1
    except Exception as error:
        log.exception("the engine cannot go on")
        end.send(EngineFailed(f"{type(error).__name__}: {error}"))
        exit_code = 1
    else:
        exit_code = 0
    end.close()
    # A runner's threads and device must not be able to keep a process alive that has said its last word.
    logging.shutdown()
    os._exit(exit_code)


class EngineLoop:
    """Drain input, step, publish; while there is nothing to do, a heartbeat a second."""

    def __init__(self, engine: Engine, end: EngineEnd, garbage: Garbage) -> None:
        self.engine = engine
        self._garbage = garbage
        self._end = end
        self._stopping = False
        self._draining = False
        self._drain_tickets: list[int] = []

    def run(self) -> None:
        """Until a shutdown is asked for, or SIGTERM came and no request is left."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        engine, end = self.engine, self._end
        while not self._stopping:
            for message in end.receive(0 if engine.has_work else HEARTBEAT_S):
                self._handle(message)
            end.send(engine.step() if engine.has_work else StepOutput([], engine.stats()))
            self._garbage.sweep(idle=not engine.has_work)
            if self._draining and not engine.has_work:
                self._finish_drain()
        engine.close()

    def _on_sigterm(self, _number: int, _frame: Any) -> None:
        """The server may still want answers: running requests are finished first."""
        self._draining = True
        self._drain_tickets.append(0)

    def _handle(self, message: Any) -> None:
        if isinstance(message, NewRequest):
            self._add(message)
        elif isinstance(message, AbortRequests):
            self.engine.abort(message.request_ids)
        elif isinstance(message, Control):
            self._control(message)

    def _add(self, new: NewRequest) -> None:
        """A request that is refused ends here with an error; nobody else notices."""
        try:
            if self._draining:
                raise AskError("the engine is draining", status=503, code="draining")
            self.engine.add(new)
        except Exception as error:
            status = getattr(error, "status", 500)
            if not isinstance(error, AskError):
                log.exception("request %s could not be added", new.request_id)
            refusal = RequestDelta(new.request_id, [], finish_reason="error", error=str(error), error_status=status)
            self._end.send(StepOutput([refusal], self.engine.stats()))

    def _control(self, control: Control) -> None:
        if control.verb == "drain":
            self._draining = True
            self._drain_tickets.append(control.ticket)
            return
        if control.verb == "shutdown":
            self.engine.abort(list(self.engine.scheduler.requests))
            self._stopping = True
        elif control.verb == "reset_prefix_cache":
            self.engine.reset_prefix_cache()
        else:
            self._end.send(ControlDone(control.ticket, False, f"unknown verb {control.verb!r}"))
            return
        self._end.send(ControlDone(control.ticket, True))

    def _finish_drain(self) -> None:
        tickets, self._drain_tickets = self._drain_tickets, []
        for ticket in tickets:
            if ticket == 0:
                self._stopping = True
            else:
                self._end.send(ControlDone(ticket, True))


def _watch_parent(directory: str) -> None:
    """Ends this process, whatever it is doing, as soon as the parent is gone, and removes the sockets' directory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(directory, ignore_errors=True)
        os.write(2, b"ERROR [engine] the server process is gone: leaving\n")
        os._exit(1)
