"""What a run records about itself: a timeline whose parts tile the steps, and calls of ops that can be made again."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from deepserve import LLM, SamplingParams
from deepserve.bench import ops as bench_ops
from deepserve.bench import step as bench_step
from deepserve.bench.ops import Roofline
from deepserve.bench.replay import recorded_cases
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.ops.check import check
from deepserve.ops.load import load_kernel, load_op
from deepserve.recording import shapes, steps
from deepserve.recording.kernels import CompiledKernels
from deepserve.recording.timeline import Timeline
from tests.tiny import write_checkpoint
from tests.unit.history_engine import make_engine

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [(7 * i) % 290 + 5 for i in range(40)]]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PARTS = ("prepare", "forward", "sample")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint("deepseek-v2-lite", tmp_path_factory.mktemp("v2") / "v2"))


def run(path, rounds=1, **fields):
    """Greedy tokens of all rounds, and how many steps they took."""
    llm = LLM(path, dtype="float32", max_model_len=128, max_num_seqs=4, num_gpu_blocks_override=40, **fields)
    outputs = [llm.generate(PROMPTS, GREEDY, use_tqdm=False) for _ in range(rounds)]
    num_steps = llm.engine.stats().num_steps
    llm.shutdown()
    return [output.outputs[0].token_ids for answers in outputs for output in answers], num_steps


def spans_of(file):
    return [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]


def end(span):
    return span["ts"] + span["dur"]


def test_kernels_that_are_compiled_while_serving_are_counted_and_named(caplog):
    triton = pytest.importorskip("triton")
    knobs, counters = triton.knobs.runtime, {}
    before = knobs.jit_post_compile_hook
    try:
        compiled = CompiledKernels()
        assert knobs.jit_post_compile_hook is None
        compiled.start(counters)
        assert counters == {CompiledKernels.name: 0}
        told = SimpleNamespace(module="m", name="_rope_kernel", jit_function=None)
        knobs.jit_post_compile_hook(key="k", repr="[16]", fn=told, compile={}, already_compiled=False)
        assert counters == {CompiledKernels.name: 1}
        assert "_rope_kernel was compiled while serving" in caplog.text
        engine = make_engine(0)
        engine._counters = counters
        assert engine.stats().num_compiled_kernels == engine.counters[CompiledKernels.name] == 1
        CompiledKernels()
        assert knobs.jit_post_compile_hook is None
    finally:
        knobs.jit_post_compile_hook = before


@pytest.mark.parametrize("ahead", [False, True])
def test_the_parts_of_a_step_fill_it_and_the_gaps_lie_between(checkpoint, tmp_path, ahead):
    file = tmp_path / "trace.json"
    plain, _ = run(checkpoint, 2, async_scheduling=ahead)
    traced, num_steps = run(checkpoint, 2, async_scheduling=ahead, trace_file=str(file))
    assert traced == plain
    spans = spans_of(file)
    by_name = {name: [span for span in spans if span["name"] == name] for name in {span["name"] for span in spans}}
    steps, gaps = by_name["step"], by_name["host gap"]
    assert len(steps) == num_steps == len(by_name["update"])
    assert {span["name"] for span in spans} == {*PARTS, "step", "host gap", "logits", "schedule", "wait", "update"}
    for step in steps:
        inside = [span for name in PARTS for span in by_name[name] if step["ts"] <= span["ts"] < end(step)]
        assert [span["name"] for span in inside] == list(PARTS)
        assert sum(span["dur"] for span in inside) == pytest.approx(step["dur"], abs=0.05)
    assert sum(step["args"]["tokens"] for step in steps if step["args"]["prefills"]) >= sum(map(len, PROMPTS))
    assert len(gaps) == len(steps) - 2  # none before a round: nobody had asked for anything
    for gap in gaps:
        assert any(end(step) == pytest.approx(gap["ts"], abs=0.01) for step in steps)
        assert any(step["ts"] == pytest.approx(end(gap), abs=0.01) for step in steps)


def test_ops_lie_in_the_steps(checkpoint, tmp_path):
    file = tmp_path / "trace.json"
    _, num_steps = run(checkpoint, trace_file=str(file), trace_ops=True)
    spans = spans_of(file)
    experts = [span for span in spans if span["name"].startswith("moe_experts")]
    assert len(experts) == 2 * num_steps  # of three layers the first is dense
    forwards = [span for span in spans if span["name"] == "forward"]
    assert all(any(one["ts"] <= span["ts"] <= end(span) <= end(one) for one in forwards) for span in experts)


def test_what_is_not_asked_for_is_not_there(checkpoint, tmp_path):
    llm = LLM(checkpoint, dtype="float32", max_model_len=64, num_gpu_blocks_override=20)
    runner = llm.engine.executor._runner
    for owner in (llm.engine, llm.engine.scheduler, llm.engine.executor):
        assert not {"schedule", "update", "add", "result", "close"} & vars(owner).keys()
    assert "execute" not in vars(runner)
    bound = runner.forward
    while hasattr(bound, "forward"):  # what records and replays steps wraps it
        bound = bound.forward
    forward = bound._function.__func__.__globals__
    kernels = {load_kernel(op, name).function for op, name in llm.plan.kernels.items()}
    assert kernels & {value for value in forward.values() if callable(value)}
    assert not [value for value in forward.values() if hasattr(value, "__wrapped__")]
    llm.shutdown()


def test_a_timeline_keeps_the_last_spans_and_says_how_many_it_left_out(tmp_path):
    timeline = Timeline(str(tmp_path / "trace.json"), limit=3)
    for number in range(10):
        timeline.add("engine", f"span {number}", 1000 * number, 1000 * number + 500, number=number)
    timeline.close()
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found["otherData"] == {"spans_left_out": 7}
    spans = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert [(span["name"], span["ts"], span["dur"]) for span in spans] == [
        ("span 7", 0, 0.5), ("span 8", 1, 0.5), ("span 9", 2, 0.5),
    ]  # fmt: skip


def test_what_cannot_be_written_or_makes_no_sense_is_refused(checkpoint, tmp_path):
    for fields, field in (
        ({"trace_file": str(tmp_path / "no" / "trace.json")}, "trace_file"),
        ({"trace_ops": True}, "trace_ops"),
        ({"capture_shapes": f"{checkpoint}/config.json"}, "capture_shapes"),
    ):
        with pytest.raises(AskError) as refused:
            run(checkpoint, **fields)
        assert refused.value.field == field


def test_recorded_calls_can_be_made_again(checkpoint, tmp_path):
    directory = tmp_path / "shapes"
    plain, _ = run(checkpoint)
    recorded, num_steps = run(checkpoint, capture_shapes=str(directory))
    assert recorded == plain
    (file,) = directory.iterdir()
    head, *calls, experts = map(json.loads, file.read_text().splitlines())
    assert head["dtype"] == "fp32" and head["calls_left_out"] == 0
    num_tokens = sum(map(len, PROMPTS)) + len(PROMPTS) * (GREEDY.max_tokens - 1)
    assert [sum(layer) for layer in experts["experts"]] == [3 * num_tokens] * 2  # 3 experts a token, 2 layers
    assert sum(call["calls"] for call in calls if call["op"].startswith("mla_attention")) == 3 * num_steps
    dtype, cases = recorded_cases(str(directory))
    assert dtype == "fp32"
    q_nope, q_rope, cache, *_, batch, _ = cases["mla_attention"][0].make(torch.Generator(), torch.float32, "cpu")
    assert q_nope.shape == (3, 4, 16) and q_rope.shape == (3, 4, 8)
    assert batch.query_lens == [1, 1, 1]
    assert int(batch.block_table.max()) < len(cache) < 40  # renumbered: the rest of the cache is not needed
    assert int(batch.slot_mapping.max()) < cache.shape[0] * cache.shape[1]


def test_a_recorded_cache_of_bytes_holds_numbers(checkpoint, tmp_path):
    run(checkpoint, capture_shapes=str(tmp_path), kv_cache_dtype="fp8")
    _, cases = recorded_cases(str(tmp_path))
    for op in ("mla_attention_fp8", "rms_norm_rope_write_latent_fp8"):
        for case in cases[op]:
            arguments = case.make(torch.Generator(), torch.float32, "cpu")
            cache = arguments[load_op(op).parameters.index("cache")]
            for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16, torch.float16, torch.float32):
                numbers = cache.view(dtype).float()
                assert ((numbers > 0) & (numbers < 2)).all()
            assert check(op, "cpu", case, torch.float32, "cpu", 1) is None


def test_what_is_recorded_is_bounded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "MAX_CALLS", 1)
    run(checkpoint, capture_shapes=str(tmp_path))
    (file,) = tmp_path.iterdir()
    head, *calls, _ = map(json.loads, file.read_text().splitlines())
    assert len({call["op"] for call in calls}) == len(calls)
    assert head["calls_left_out"] > 0


def test_bench_ops_replays_them(checkpoint, tmp_path, monkeypatch, capsys):
    run(checkpoint, capture_shapes=str(tmp_path))
    monkeypatch.setattr(bench_ops, "measure_roofline", lambda device, dtype: Roofline(1e10, 1e11))
    monkeypatch.setattr(bench_ops, "MEASURED_S", 0.0)
    assert bench_ops.run(["--replay", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    _, cases = recorded_cases(str(tmp_path))
    assert {line.split()[0] for line in lines} == cases.keys() > {"mla_attention", "rms_norm", "rope"}
    with pytest.raises(AskError, match="no recorded run"):
        bench_ops.run(["--replay", str(tmp_path / "nothing")])


def test_bench_step_reads_the_timeline(checkpoint, tmp_path):
    config = Config(
        model=checkpoint, dtype="float32", max_model_len=128, num_gpu_blocks_override=60,
        trace_file=str(tmp_path / "kept.json"),
    )  # fmt: skip
    result = bench_step.run(config, bench_step.Load(num_requests=3, context=20, num_steps=12, seed=0), with_ops=True)
    assert result["num_steps"] == 12 - 1 - bench_step.NUM_SKIPPED
    assert result["parts_ms"].keys() == {
        *bench_step.PARTS, *bench_step.BESIDE,
    } - {"idle", "device: forward", "device: host gap"}  # fmt: skip
    assert sum(result["parts_ms"].get(name, 0) for name in bench_step.PARTS) == pytest.approx(
        result["step_ms"], rel=0.3
    )
    assert {"mla_attention", "rope"} < result["ops_ms"].keys()
    assert sum(result["ops_ms"].values()) < result["ops_step_ms"]
    assert len(spans_of(tmp_path / "kept.json")) > 60
    text = bench_step.report(result)
    assert re.search(r"a decode step of 3 requests from 20 tokens on: \d+\.\d+ ms, median of 8", text)
    assert re.search(r"^forward +\d+\.\d+ +\d+\.\d%", text, re.M)
    with pytest.raises(AskError, match="more than a step of"):
        bench_step.run(config, bench_step.Load(num_requests=3, context=120, num_steps=12, seed=0), with_ops=False)


def test_the_device_lane_places_spans_by_distances_of_events(tmp_path, monkeypatch):
    """Its arithmetic, on events of a simulated device that is behind the host: no GPU is needed for that."""
    now, done = [0.0], [0.0]  # milliseconds: what the stream has been given to do, and how far it is

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            done[0] = now[0]

        def query(self):
            return self.at <= done[0]

        def elapsed_time(self, other):
            assert self.query() and other.query(), "CUDA refuses events that are not over"
            return other.at - self.at

    def work(milliseconds):
        now[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.__setitem__(0, now[0]))
    timeline = Timeline(str(tmp_path / "trace.json"))
    clock = steps._DeviceClock(timeline)
    for number in range(3):
        clock.span("forward", lambda: (clock.span("op", work, 2), work(3)))
        if number == 1:
            done[0] = now[0] - 4  # the op of this forward is over, and the forward is not
            clock.settle()
        work(0.25)  # it samples
        clock.end_step()
        work(0.75)  # and waits
    clock.settle(wait=True)
    timeline.close()
    spans = [(span["name"], round(span["ts"], 3), span["dur"]) for span in spans_of(tmp_path / "trace.json")]
    expected = []
    for number in range(3):
        expected += [("host gap", 6e3 * number - 750, 750)] * (number > 0)
        expected += [("op", 6e3 * number, 2e3), ("forward", 6e3 * number, 5e3)]
    assert spans == expected
