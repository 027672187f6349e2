"""Engines around the runner of history_runner.py, with everything else real; importable from a spawned process."""

import os
import time
from types import SimpleNamespace

from deepserve.engine.admission import RequestLimits
from deepserve.engine.engine import Engine
from deepserve.engine.executor import Executor
from deepserve.errors import AskError
from deepserve.kv_cache.manager import KvCacheManager
from deepserve.messages import NewRequest
from deepserve.sampling_params import SamplingParams
from deepserve.scheduler.budget import StepLimits
from deepserve.scheduler.scheduler import Scheduler
from tests.unit.history_runner import VOCAB_SIZE, HistoryRunner

EOS = (7,)
MAX_MODEL_LEN = 64


def make_engine(
    depth: int = 0, num_blocks: int = 64, max_num_seqs: int = 4, max_num_tokens: int = 16, queued: int | None = None
) -> Engine:
    """An engine with blocks of 4 tokens and a context of 64; its runner is `engine.runner`'s to break."""
    limits = StepLimits(max_num_seqs, max_num_tokens)
    scheduler = Scheduler(limits, KvCacheManager(num_blocks, 4), EOS)
    runner = HistoryRunner(num_blocks, 4, max_num_seqs)
    open_requests = None if queued is None else max_num_seqs + queued
    return Engine(scheduler, Executor(runner, depth), RequestLimits(VOCAB_SIZE, MAX_MODEL_LEN, open_requests))


def runner_of(engine: Engine) -> HistoryRunner:
    """The runner, to break it."""
    return engine.executor._runner


def ask(request_id: str, prompt: list[int], **sampling) -> NewRequest:
    """A request with a seed, so that its tokens are known."""
    return NewRequest(request_id, prompt, SamplingParams(**{"seed": 3, **sampling}), 0.0)


def build(plan: SimpleNamespace, on_phase) -> Engine:
    """What a spawned process builds: `plan.mode` says how it behaves."""
    on_phase("model", 0.5)
    if plan.mode == "ask_error":
        raise AskError("does not fit", field="max_model_len", hint="smaller")
    if plan.mode == "crash":
        raise RuntimeError("no such device")
    if plan.mode == "exit":
        os._exit(9)
    engine = make_engine(plan.async_depth)
    runner = runner_of(engine)
    runner.broken = set(plan.broken)
    if plan.mode == "slow":
        execute = runner.execute

        def slowly(step):
            time.sleep(0.05)
            return execute(step)

        runner.execute = slowly
    return engine


def plan_of(mode: str = "", async_depth: int = 0, broken: tuple[int, ...] = ()) -> SimpleNamespace:
    """What `build` reads."""
    return SimpleNamespace(mode=mode, async_depth=async_depth, broken=broken)
