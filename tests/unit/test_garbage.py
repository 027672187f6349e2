"""Garbage is collected between steps and not in them, and none of it stays for long."""

import gc
import weakref

import pytest

from deepserve.engine import garbage as room
from deepserve.engine.garbage import SWEEPS, YOUNG, Garbage
from tests.unit.history_engine import ask, make_engine, runner_of


class Loop:
    """A cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    gc.enable()
    gc.unfreeze()


def test_nothing_is_collected_by_itself_and_all_is_as_it_was_after_it() -> None:
    with Garbage():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    with pytest.raises(ValueError), Garbage():
        raise ValueError
    assert not gc.isenabled()


def test_cycles_do_not_pile_up() -> None:
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0
    with Garbage() as garbage:
        for _ in range(1000):
            for _ in range(100):
                alive.add(Loop())
            most = max(most, len(alive))
            garbage.sweep()
        assert 1000 < most <= YOUNG
        garbage.sweep(idle=True)
        assert not alive
        kept = [Loop() for _ in range(50)]
        alive.update(kept)
        del kept
        garbage.sweep(idle=True)  # nothing was done since the last time
        assert len(alive) == 50


def test_what_grew_old_is_collected_too(monkeypatch) -> None:
    monkeypatch.setattr(room, "YOUNG", 200)
    old: weakref.WeakSet = weakref.WeakSet()
    with Garbage() as garbage:
        kept = []
        for number in range(300 * SWEEPS):
            kept.append(Loop())
            if number % 300 == 299:
                garbage.sweep()
                old.update(kept)
                kept = []  # they have outlived a sweep
        assert len(old) <= 300


@pytest.mark.parametrize("depth", [0, 1])
def test_a_loop_of_many_requests_collects_between_steps_only(depth, monkeypatch) -> None:
    monkeypatch.setattr(room, "YOUNG", 500)
    engine = make_engine(depth, max_num_seqs=8)
    runner, inside, collected = runner_of(engine), [False], []
    execute = runner.execute

    def watched(step):
        inside[0] = True
        loops = [Loop() for _ in range(40)]  # what a step's own objects may be
        try:
            return execute(step)
        finally:
            del loops
            inside[0] = False

    def note(phase, info) -> None:
        if phase == "start":
            collected.append(inside[0])

    runner.execute = watched
    gc.callbacks.append(note)
    try:
        with Garbage() as garbage:
            counts = []
            for number in range(600):
                engine.add(ask(str(number), [number % 50] * (1 + number % 30), max_tokens=10))
                for _ in range(4):
                    engine.step()
                    garbage.sweep(idle=not engine.has_work)
                counts.append(len(gc.get_objects()))
            while engine.has_work:
                engine.step()
                garbage.sweep(idle=not engine.has_work)
    finally:
        gc.callbacks.remove(note)
        engine.close()
    assert len(collected) > 20
    assert depth or not any(collected)  # with a thread a step may run while the loop sweeps
    assert max(counts[300:]) <= max(counts[:300]) + 2000


def test_the_offline_door_leaves_the_collector_as_it_was(tmp_path) -> None:
    from deepserve import LLM, SamplingParams
    from tests.tiny import write_checkpoint

    llm = LLM(str(write_checkpoint("llama", tmp_path)), dtype="float32", max_model_len=64, max_num_seqs=8)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    seen, step = [], llm.engine.step

    def watched():
        seen.append(gc.isenabled())
        return step()

    llm.engine.step = watched
    counts = []
    for number in range(6):
        prompts = [[(number + other) % 250 + 5] * (1 + other % 20) for other in range(24)]
        llm.generate(prompts, sampling, use_tqdm=False)
        gc.collect()
        counts.append(len(gc.get_objects()))
    llm.shutdown()
    assert not any(seen) and gc.isenabled()
    assert counts[-1] <= counts[1] + 200, counts
