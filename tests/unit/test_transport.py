"""The sockets and what may cross them, and the client of an engine in a process of its own."""

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import stat
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from deepserve.engine import transport
from deepserve.engine.client import ProcessClient
from deepserve.engine.transport import TO_CLIENT, TO_ENGINE, ClientEnd, Codec, EngineEnd, Rejected
from deepserve.errors import AskError
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
    TokenLogprobs,
)
from deepserve.sampling_params import SamplingParams
from tests.unit.history_engine import EOS, ask, build, plan_of
from tests.unit.history_runner import undisturbed

STATS = EngineStats(1, 2, 0.5, 3, 4, 5, 6, 7, 0.8, 9.0)
SAMPLING = SamplingParams(
    temperature=0.3, seed=2**64 - 1, stop=["a", "é\n"], logit_bias={3: -1.5}, allowed_token_ids=[1, 2], logprobs=2,
    bad_words_ids=[[1], [2, 3]], max_tokens=None,
)  # fmt: skip
ENTRY = TokenLogprobs([1, 2], [-0.5, float("-inf")], [1, 2])
MESSAGES = [
    NewRequest("a", [1, 2, 3], SAMPLING, 1.5, -3, "salt"),
    AbortRequests(["a", "b"]),
    Control("drain", 7),
    Phase("weights", 1.25),
    Ready(STATS),
    StepOutput([RequestDelta("a", [1], [ENTRY], [None, ENTRY], "stop", 5, 3, 1.0, 2, None)], STATS),
    ControlDone(3, False, "why"),
    EngineFailed("why", True, "field", "hint"),
]


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_arrive_as_they_were(message):
    codec = Codec(TO_ENGINE + TO_CLIENT)
    assert codec.decode(codec.encode(message)) == message


def test_every_field_of_sampling_crosses_and_is_checked_again():
    codec = Codec(TO_ENGINE)
    name, body = codec.encode(MESSAGES[0])
    fields = msgspec.msgpack.decode(body)
    assert set(fields["sampling"]) == set(SamplingParams.__dataclass_fields__)
    fields["sampling"]["temperature"] = -1.0
    with pytest.raises(Rejected, match="temperature"):
        codec.decode([name, msgspec.msgpack.encode(fields)])


def test_a_direction_has_its_own_types():
    with pytest.raises(Rejected, match="unknown type b'StepOutput'"):
        Codec(TO_ENGINE).decode(Codec(TO_CLIENT).encode(MESSAGES[5]))


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_unpickled(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codec, bomb = Codec(TO_ENGINE + TO_CLIENT), pickle.dumps(_Bomb(), protocol)
    for frames in ([bomb], [bomb, bomb], *([kind.__name__.encode(), bomb] for kind in TO_ENGINE + TO_CLIENT)):
        with pytest.raises(Rejected):
            codec.decode(frames)
    for number in range(128):
        with pytest.raises(Rejected):
            codec.decode([b"Control", msgspec.msgpack.encode(msgspec.msgpack.Ext(number, bomb))])
    assert not list(tmp_path.iterdir())


def test_broken_bytes_are_rejected_and_nothing_else():
    codec = Codec(TO_ENGINE + TO_CLIENT)
    accepted = 0
    for _ in range(5000):
        name, body = codec.encode(random.choice(MESSAGES))
        damaged = bytearray(body)
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        cut = bytes(damaged[: random.randint(0, len(damaged))])
        with contextlib.suppress(Rejected):
            accepted += type(codec.decode([name, cut])).__name__.encode() == name
    assert accepted < 1000
    deep = b"\x91" * 100_000 + b"\xc0"
    for kind in TO_ENGINE + TO_CLIENT:
        with pytest.raises(Rejected):
            codec.decode([kind.__name__.encode(), deep])
    with pytest.raises(Rejected, match="3 frames"):
        codec.decode([b"Control", b"", b""])


def test_a_message_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 1000)
    with pytest.raises(AskError, match="1,000") as refusal:
        Codec(TO_ENGINE).encode(NewRequest("a", [1000] * 1000, SAMPLING, 0.0))
    assert refusal.value.status == 413


def test_the_ends_talk_and_drop_what_is_foreign():
    async def talk():
        client = ClientEnd()
        assert stat.S_IMODE(os.stat(client.directory).st_mode) == 0o700
        with pytest.raises(AskError, match="takes no messages"):
            client.send(Control("drain"))
        engine = EngineEnd(client.directory)
        stranger = zmq.Context.instance().socket(zmq.PUSH)
        stranger.connect(f"ipc://{client.directory}/to_engine")
        stranger.send_multipart([b"NewRequest", pickle.dumps(_Bomb())])
        stranger.send(b"x")
        for _ in range(100):
            await asyncio.sleep(0.01)
            try:
                client.send(MESSAGES[0])
                break
            except AskError:
                pass
        received = []
        while not received:
            received += engine.receive(5.0)
        assert received == [MESSAGES[0]]
        assert engine.receive(0) == []
        engine.send(MESSAGES[5])
        assert await asyncio.wait_for(client.receive(), 5) == MESSAGES[5]
        stranger.close(linger=0)
        engine.close()
        client.close()
        assert not Path(client.directory).exists()

    asyncio.run(talk())


class _Answers:
    """What the listeners of requests were told."""

    def __init__(self, client):
        self.client, self.told, self.done = client, {}, asyncio.Event()
        self.num_open = 0

    def add(self, new):
        deltas = self.told[new.request_id] = []

        def listen(delta):
            deltas.append(delta)
            self.num_open -= delta.finish_reason is not None
            if not self.num_open:
                self.done.set()

        self.client.add(new, listen)
        self.num_open += 1
        self.done.clear()

    async def all(self):
        await asyncio.wait_for(self.done.wait(), 30)
        return {name: deltas[-1] for name, deltas in self.told.items() if deltas}

    def tokens(self, name):
        return [token_id for delta in self.told[name] for token_id in delta.new_token_ids]


def _with_engine(plan, work):
    """Runs `work(client)` with an engine process; the process and the socket directory are gone afterwards."""

    async def live():
        client = ProcessClient()
        await asyncio.wait_for(client.start(plan, build=build), 60)
        process, directory = client._process, client._end.directory
        pid = process.pid
        try:
            await work(client)
        finally:
            await asyncio.wait_for(client.shutdown(), 30)
        assert not client.alive
        assert not Path(directory).exists()
        assert pid not in {child.pid for child in multiprocessing.active_children()}

    asyncio.run(live())


def test_an_engine_process_serves_many_requests_and_verbs():
    async def work(client):
        answers = _Answers(client)
        asked = [ask(str(idx), [idx % 3] * (idx + 1), max_tokens=12, ignore_eos=True) for idx in range(20)]
        for new in asked:
            answers.add(new)
        with pytest.raises(AskError, match="in use"):
            client.add(asked[0], print)
        answers.add(ask("bad", [10_000]))
        last = await answers.all()
        for new in asked:
            assert answers.tokens(new.request_id) == undisturbed(new, 12, EOS)[0]
        assert (last["bad"].finish_reason, "vocabulary" in last["bad"].error) == ("error", True)
        assert last["bad"].error_status == 400  # the asker's fault, not the engine's
        assert client.stats.num_prefix_hits > 0
        assert await client.reset_prefix_cache()
        answers.add(ask("long", [1], max_tokens=60, ignore_eos=True))
        client.abort(["long", "nobody"])
        before = client.last_heartbeat
        await asyncio.sleep(1.5)
        assert client.last_heartbeat > before  # idle, and heard of
        assert (client.stats.num_running, client.stats.num_waiting) == (0, 0)
        answer = await client._ask("dance")
        assert (answer.ok, "dance" in answer.message) == (False, True)

    _with_engine(plan_of(async_depth=1), work)


def test_a_killed_engine_leaves_nobody_waiting():
    async def work(client):
        answers = _Answers(client)
        for name in "abc":
            answers.add(ask(name, [1], max_tokens=60, ignore_eos=True))
        os.kill(client._process.pid, signal.SIGKILL)
        begun = time.monotonic()
        last = await answers.all()
        assert time.monotonic() - begun < 20
        assert all(delta.finish_reason == "error" and "exit code -9" in delta.error for delta in last.values())
        assert not client.alive
        with pytest.raises(AskError) as refusal:
            answers.add(ask("d", [1]))
        assert refusal.value.status == 503
        assert not await client.reset_prefix_cache()

    _with_engine(plan_of("slow"), work)


def test_an_engine_that_cannot_go_on_says_why():
    async def work(client):
        answers = _Answers(client)
        for idx in range(40):
            answers.add(ask(str(idx), [1]))
        last = await answers.all()
        reasons = {delta.error for delta in last.values()}
        assert any("its step failed: RuntimeError: the device fell over" in reason for reason in reasons)
        assert any("3 steps in a row failed" in reason for reason in reasons)

    _with_engine(plan_of(broken=tuple(range(100))), work)


def test_shutdown_drains_or_aborts():
    async def drained(client):
        answers = _Answers(client)
        answers.add(ask("a", [1], max_tokens=10, ignore_eos=True))
        draining = asyncio.create_task(client.shutdown(drain=True))
        await asyncio.sleep(0.1)
        answers.add(ask("late", [1]))
        await draining
        last = await answers.all()
        assert (last["a"].finish_reason, len(answers.tokens("a"))) == ("length", 10)
        assert (last["late"].finish_reason, "draining" in last["late"].error) == ("error", True)

    async def aborted(client):
        answers = _Answers(client)
        answers.add(ask("a", [1], max_tokens=60, ignore_eos=True))
        await client.shutdown()
        assert (await answers.all())["a"].finish_reason == "abort"

    for work in (drained, aborted):
        asyncio.run(_started(work))


async def _started(work):
    client = ProcessClient()
    await client.start(plan_of("slow"), build=build)
    await work(client)


def test_sigterm_finishes_what_runs():
    async def work(client):
        answers = _Answers(client)
        answers.add(ask("a", [1], max_tokens=10, ignore_eos=True))
        await asyncio.sleep(0.2)
        os.kill(client._process.pid, signal.SIGTERM)
        assert (await answers.all())["a"].finish_reason == "length"
        await asyncio.wait_for(client._exited.wait(), 10)
        client._process.join()
        assert client._process.exitcode == 0

    _with_engine(plan_of("slow"), work)


@pytest.mark.parametrize(
    "mode, error, text",
    [
        ("ask_error", AskError, "max_model_len: does not fit"),
        ("crash", RuntimeError, "no such device"),
        ("exit", RuntimeError, "exit code 9"),
    ],
)
def test_a_start_that_fails_says_why(mode, error, text):
    async def start():
        client, phases = ProcessClient(), []
        with pytest.raises(error, match=text):
            await client.start(plan_of(mode), lambda *phase: phases.append(phase), build)
        assert phases in ([("model", 0.5)], [])  # a process that ends at once may not get its last words out
        assert mode == "exit" or phases
        await client.shutdown()

    asyncio.run(start())


def _parent(pipe):
    """A server that starts an engine and is killed."""

    async def live():
        client = ProcessClient()
        await client.start(plan_of("slow"), build=build)
        client.add(ask("a", [1], max_tokens=60, ignore_eos=True), lambda delta: None)
        pipe.send((client._process.pid, client._end.directory))
        await asyncio.sleep(60)

    asyncio.run(live())


def test_an_engine_does_not_outlive_its_server():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    server = context.Process(target=_parent, args=(theirs,))
    server.start()
    assert ours.poll(60)
    pid, directory = ours.recv()
    server.kill()
    server.join()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)
    assert not Path(directory).exists()


def test_a_terminals_interrupt_does_not_meet_a_starting_engine():
    """Ctrl-C goes to every process of a terminal; what is to be done is the server's decision."""

    async def live():
        client = ProcessClient()
        starting = asyncio.create_task(client.start(plan_of(), build=build))
        while client._process is None:
            await asyncio.sleep(0)
        for _ in range(100):
            os.kill(client._process.pid, signal.SIGINT)
            await asyncio.sleep(0.01)
        await asyncio.wait_for(starting, 60)
        assert client.alive
        await client.shutdown()

    asyncio.run(live())


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
