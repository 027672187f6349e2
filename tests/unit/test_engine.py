"""The engine's step: what it refuses, how failures end, what it tells; with a runner that checks what it reads."""

import threading

import pytest

from deepserve.engine.engine import EngineDead
from deepserve.engine.executor import Executor
from deepserve.errors import AskError
from deepserve.messages import NewRequest, RequestDelta
from deepserve.sampling_params import SamplingParams
from deepserve.scheduler.output import ScheduledStep, StepResult
from tests.unit.history_engine import EOS, MAX_MODEL_LEN, ask, make_engine, runner_of
from tests.unit.history_runner import VOCAB_SIZE, undisturbed


def _run(engine, limit=5000) -> dict[str, list[RequestDelta]]:
    told: dict[str, list[RequestDelta]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return told
        for delta in engine.step().deltas:
            told.setdefault(delta.request_id, []).append(delta)
    raise AssertionError("it never ends")


def _tokens(deltas) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.new_token_ids]


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_of_all_lengths_have_the_tokens_that_they_have_alone(depth):
    engine = make_engine(depth, num_blocks=20)
    asked = [ask(str(i), [i // 10] * (1 + 3 * i % 40), max_tokens=None, ignore_eos=i % 2 == 0) for i in range(20)]
    for new in asked:
        engine.add(new)
    told = _run(engine)
    for new in asked:
        tokens, reason = undisturbed(new, MAX_MODEL_LEN - len(new.prompt_token_ids), EOS)
        assert (_tokens(told[new.request_id]), told[new.request_id][-1].finish_reason) == (tokens, reason)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0)
    assert stats.num_preemptions > 0
    assert engine.counters["chunked_prefill"] > 0
    assert engine.counters["prefix_caching"] == stats.num_prefix_hits > 0
    assert (engine.counters["async_scheduling"] > 0) == (depth == 1)
    engine.close()


@pytest.mark.parametrize(
    "prompt, sampling, field",
    [
        ([], {}, "prompt"),
        ([1] * MAX_MODEL_LEN, {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 60, {"min_tokens": 5, "max_tokens": None}, "min_tokens"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"allowed_token_ids": [3, -1]}, "allowed_token_ids"),
        ([1], {"bad_words_ids": [[1], [1, VOCAB_SIZE]]}, "bad_words"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(prompt, sampling, field):
    engine = make_engine()
    with pytest.raises(AskError) as refusal:
        engine.add(ask("a", prompt, **sampling))
    assert refusal.value.field == field
    assert not engine.has_work


def test_the_largest_requests_that_fit_are_served():
    engine = make_engine(num_blocks=16)
    with pytest.raises(AskError, match=r"max_tokens: is 2; .* room for 1"):
        engine.add(ask("a", [1] * 63, max_tokens=2))
    engine.add(ask("a", [1] * 63, max_tokens=1, ignore_eos=True))
    engine.add(ask("b", [1], max_tokens=None, ignore_eos=True))
    told = _run(engine)
    assert (len(_tokens(told["a"])), told["a"][-1].finish_reason) == (1, "length")
    assert (len(_tokens(told["b"])), told["b"][-1].finish_reason) == (63, "length")


def test_a_full_queue_and_a_used_id_are_refused():
    engine = make_engine(max_num_seqs=1, queued=1)
    engine.add(ask("a", [1]))
    with pytest.raises(AskError, match="in use"):
        engine.add(ask("a", [1]))
    engine.add(ask("b", [1]))
    with pytest.raises(AskError) as refusal:
        engine.add(ask("c", [1]))
    assert (refusal.value.status, refusal.value.code) == (429, "queue_full")


@pytest.mark.parametrize("depth", [0, 1])
def test_a_poisoned_request_ends_alone(depth):
    engine = make_engine(depth)
    asked = [ask(name, [ord(name) % 9] * 5, max_tokens=20, ignore_eos=True) for name in "abc"]
    for new in asked:
        engine.add(new)
    runner_of(engine).poison.add("b")
    told = _run(engine)
    assert (told["b"][-1].finish_reason, told["b"][-1].error) == ("error", "poisoned")
    for new in (asked[0], asked[2]):
        assert _tokens(told[new.request_id]) == undisturbed(new, 20, EOS)[0]
    assert engine.stats().kv_cache_usage == 0
    engine.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(depth):
    engine = make_engine(depth)
    runner_of(engine).broken = {2}
    engine.add(ask("a", [1] * 5, max_tokens=10, ignore_eos=True))
    told = _run(engine)
    assert told["a"][-1].error == "its step failed: RuntimeError: the device fell over"
    assert told["a"][-1].finish_reason == "error"
    new = ask("a", [1] * 5, max_tokens=10, ignore_eos=True)
    engine.add(new)
    assert _tokens(_run(engine)["a"]) == undisturbed(new, 10, EOS)[0]
    engine.close()


def test_failures_without_end_are_the_end():
    engine = make_engine()
    runner_of(engine).broken = set(range(100))
    with pytest.raises(EngineDead, match="3 steps in a row failed, the last with RuntimeError: the device fell over"):
        for idx in range(100):
            engine.add(ask(str(idx), [1]))
            engine.step()
    assert engine.stats().num_steps == 3


def test_aborted_requests_say_so_and_leave_nothing():
    engine = make_engine(1)
    for name in "abcdef":
        engine.add(ask(name, [ord(name) % 7] * 9, max_tokens=30, ignore_eos=True))
    engine.step()
    engine.abort(["a", "f", "nobody"])
    engine.abort(["a"])
    told = _run(engine)
    assert [told[name][-1].finish_reason for name in "abcdef"] == ["abort", *["length"] * 4, "abort"]
    assert sum(delta.finish_reason is not None for deltas in told.values() for delta in deltas) == 6
    assert engine.stats().kv_cache_usage == 0
    engine.close()


def test_a_door_may_end_a_request_and_reset_the_cache_between_steps():
    engine = make_engine()
    prompt = list(range(20))
    engine.add(ask("a", prompt, max_tokens=4, ignore_eos=True))
    _run(engine)
    engine.add(ask("b", prompt, max_tokens=4, ignore_eos=True))
    assert _run(engine)["b"][0].num_cached_tokens == 16
    engine.reset_prefix_cache()
    engine.add(ask("c", prompt, max_tokens=4, ignore_eos=True))
    assert _run(engine)["c"][0].num_cached_tokens == 0


def test_sampling_parameters_of_one_object_serve_many_requests():
    engine, sampling = make_engine(), SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    for name in "ab":
        engine.add(NewRequest(name, [1, 2], sampling, 0.0))
    told = _run(engine)
    assert _tokens(told["a"]) == _tokens(told["b"])


class _Gate:
    """A runner that waits at a gate and notes which thread it is in."""

    def __init__(self):
        self.gate, self.threads = threading.Semaphore(0), set()

    def execute(self, step):
        self.gate.acquire(timeout=10)
        self.threads.add(threading.current_thread())
        if step.step == 1:
            raise MemoryError("full")
        return StepResult(step.step, {})


def test_at_depth_1_steps_run_in_one_thread_while_the_caller_goes_on():
    runner = _Gate()
    executor = Executor(runner, 1)
    for number in range(3):
        executor.submit(ScheduledStep(number, [], [], 0))
    assert list(executor.in_flight) == [0, 1, 2]
    for _ in range(3):
        runner.gate.release()
    assert executor.result().step == 0
    with pytest.raises(MemoryError, match="full"):
        executor.result()
    assert executor.result().step == 2
    executor.close()
    executor.close()
    assert len(runner.threads) == 1
    assert threading.current_thread() not in runner.threads


def test_at_depth_0_the_caller_computes():
    runner = _Gate()
    runner.gate.release()
    executor = Executor(runner, 0)
    executor.submit(ScheduledStep(0, [], [], 0))
    assert runner.threads == {threading.current_thread()}
    assert executor.result().step == 0
    executor.close()
