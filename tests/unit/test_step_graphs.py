"""Recorded steps on a CPU: padding, buffers, pieces and rows taken apart, against the plain forward of small models.

What records here keeps the function and runs it again: no graph, but the same buffers, and memory that may be lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import logging
import random
import weakref
from typing import Any

import pytest
import torch

from deepserve import LLM, SamplingParams
from deepserve.architecture import load_architecture
from deepserve.errors import AskError
from deepserve.graph.bind import bind
from deepserve.graph.pieces import beside_attention, bind_pieces, split
from deepserve.graph.rewrite import fused_ops, rewrite
from deepserve.graph.show import count_ops
from deepserve.graph.trace import trace
from deepserve.models.decoder import Decoder
from deepserve.models.registry import build_model
from deepserve.models.weights import load_weights
from deepserve.ops.load import load_kernel, load_op
from deepserve.ops.op import Kernel
from deepserve.ops.paged import make_batch, one_token_rows
from deepserve.plan import make_plan
from deepserve.plan.graphs import GraphSizes
from deepserve.runner import capture
from deepserve.runner.graphs import DecodeGraphs, MixedGraphs
from deepserve.runner.padding import BatchLimits
from deepserve.runner.pieces import PiecewiseGraphs
from deepserve.runner.recorded import RecordedSteps, TapeRecorder
from tests import tiny
from tests.driver import Driver, Request

CPU = torch.device("cpu")
LIMIT = 3e-5  # of logits that reach 5: a product of more rows may sum in another order
SIZES = (1, 2, 4, 8, 16, 48)
MAX_MODEL_LEN = 128
ATTENTION = ("mla_attention", "gqa_attention")


class Again:
    """Records by running the function, and replays by running it again.

    As in a pool of memory, what nobody holds is lost once a later recording is replayed: it becomes NaN.
    """

    def __init__(self) -> None:
        self.num_recorded = 0
        self.lost: list[tuple[int, torch.Tensor]] = []  # from which recording on, and its memory

    def record(self, function: Any) -> Any:
        number, result = self.num_recorded, function()
        self.num_recorded += 1
        results = [one.detach() for one in _tensors(result)]
        for one, kept in zip(_tensors(result), results):
            weakref.finalize(one, lambda kept=kept: self.lost.append((self.num_recorded, kept)))

        def replay() -> None:
            for start, memory in self.lost:
                if start <= number:
                    memory.fill_(torch.nan)
            for target, value in zip(results, _tensors(function())):
                target.copy_(value)

        return replay, result

    def bare(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def on_device(op: str, takes_out: bool) -> Kernel:
    """The reference of an attention, which learns lengths where a GPU's kernels do, and may be told where to write."""
    reference, place = load_op(op), load_op(op).parameters.index("batch")
    names = [*reference.parameters, *(("out",) if takes_out else ())]

    def attention(*args: Any) -> torch.Tensor:
        batch, count = args[place], len(reference.parameters)
        real = dataclasses.replace(batch, context_lens=batch.seq_lens.tolist(), derived={})
        result = reference(*args[:place], real, *args[place + 1 : count])
        return result if args[count:] in ((), (None,)) else args[count].copy_(result)

    kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    attention.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    return Kernel(op, "on device", attention)


@pytest.fixture(scope="module", params=["deepseek-v3", "llama", "qwen2"])
def model(request, tmp_path_factory) -> Decoder:
    path = tiny.write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    model = build_model(load_architecture(path), torch.float32, "cpu")
    load_weights(model, path)
    return model


def rewritten(model: Decoder):
    graph = trace(model)
    rewrite(graph, beside_attention({name for name in fused_ops() if "fp8" not in name}))
    kernels = {op: load_kernel(op, "reference") for op in count_ops(graph)}
    return graph, kernels | {op: on_device(op, True) for op in ATTENTION if op in kernels}


class Recorded:
    """A driver whose forward is one that records, with the forward of all else counted."""

    def __init__(self, model: Decoder, mode: str, takes_out: bool = True, sizes=SIZES):
        self.driver = Driver(model)
        self.counters: dict[str, int] = {}
        self.plain: list[int] = []  # tokens of the steps that ran as they are
        limits = BatchLimits(self.driver.block_size, MAX_MODEL_LEN, self.driver.free.pop(0))
        graph, kernels = rewritten(model)
        kernels |= {op: on_device(op, takes_out) for op in ATTENTION if op in kernels}
        bound = bind(graph, kernels)
        self.recorder = Again()

        def forward(batch) -> torch.Tensor:
            self.plain.append(len(batch.positions))
            return bound(batch)

        rest, made = forward, []
        if mode in ("PIECEWISE", "FULL_AND_PIECEWISE"):
            pieces = bind_pieces(graph, kernels)
            rest = PiecewiseGraphs(forward, pieces, sizes, limits, self.recorder, self.counters, CPU)
            made.append(rest)
        if mode.startswith("FULL"):
            rest = DecodeGraphs(bound, rest, sizes, limits, self.recorder, self.counters, CPU)
            made.append(rest)
        for one in made:
            one.capture()
        self.driver.forward = MixedGraphs(rest, self.counters) if mode == "FULL" else rest


def prompts(rng: random.Random, lengths) -> list[list[int]]:
    return [[rng.randrange(tiny.VOCAB_SIZE) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def scenario(driver: Driver, texts: list[list[int]], seed: int) -> list[torch.Tensor]:
    """The logits of steps of every kind: prompts, chunks, mixtures with decodes, a shared prefix, decodes alone."""
    rng, found = random.Random(seed), []
    requests = [Request(text) for text in texts]
    found += driver.step([(requests[0], 33), (requests[1], 1), (requests[2], 5)])
    found += driver.step([(requests[0], 7), (requests[1], 1), (requests[2], 1)])
    driver.share(requests[3], requests[0], 24)
    found += driver.step([(requests[3], 4), (requests[0], 1), (requests[1], 1), (requests[2], 2)])
    for count in (1, 3, 3):
        found += driver.step([(request, 1) for request in requests[:count]])
    found += driver.step([(requests[3], 2)])
    found += driver.step([(requests[4], 60), (requests[3], 1)])  # more than the largest size
    for _ in range(4):
        rows = [(one, rng.randint(1, 3)) for one in rng.sample(requests, rng.randint(1, 5))]
        found += driver.step([(one, count) for one, count in rows if one.num_computed + count <= len(one.token_ids)])
    return found


MODES = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


@pytest.mark.parametrize("takes_out", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_computes_what_the_plain_forward_does(model, mode, takes_out) -> None:
    rng = random.Random()
    texts = prompts(rng, (60, 30, 40, 50, 90))
    texts[3][:24] = texts[0][:24]
    expected = scenario(Driver(model), texts, 1)
    made = Recorded(model, mode, takes_out)
    made.plain.clear()
    found = scenario(made.driver, texts, 1)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() <= LIMIT
    assert 61 in made.plain
    counters = made.counters
    if mode in ("PIECEWISE", "FULL", "FULL_AND_PIECEWISE"):
        assert made.plain == [61]  # nothing else ran as it is
    if mode == "FULL_DECODE_ONLY":
        assert counters == {"cuda_graphs": counters["cuda_graphs"]} and counters["cuda_graphs"] >= 3
    if mode == "FULL":
        assert counters["mixed_graphs"] >= 4 and counters["cuda_graphs"] >= counters["mixed_graphs"] + 3
    if mode == "FULL_AND_PIECEWISE":
        assert counters["piecewise_graphs"] >= 4 and counters["cuda_graphs"] >= 3
    if "PIECEWISE" in mode:
        first = min(start for start, _ in made.recorder.lost)
        assert first < len(model.layers), "a result should be held no longer than until its last reader is recorded"


@torch.inference_mode()
def test_rows_of_padding_stay_finite_and_write_to_nobody(model) -> None:
    made = Recorded(model, "PIECEWISE")
    driver = made.driver
    one, other = (Request(text) for text in prompts(random.Random(), (30, 30)))
    driver.step([(one, 20)])
    before = [cache.clone() for cache in driver.caches]
    driver.step([(other, 9)])
    padding = made.driver.forward._table[0, 0]
    for cache, old in zip(driver.caches, before):
        changed = (cache != old) & ~(cache.isnan() & old.isnan())
        assert set(changed.flatten(1).any(1).nonzero().flatten().tolist()) <= {*other.blocks, int(padding)}
    buffers = list(driver.forward._attended.values())
    assert buffers and all(buffer.isfinite().all() and len(buffer) == SIZES[-1] for buffer in buffers)


def test_pieces_alternate_and_say_what_crosses(model) -> None:
    graph, _ = rewritten(model)
    pieces = split(graph)
    assert [piece.attends for piece in pieces] == [False, True] * len(model.layers) + [False]
    made: set[str] = set()
    for piece in pieces:
        assert made.issuperset(piece.inputs)
        made |= set(piece.outputs)
    assert len(pieces[-1].outputs) == 1
    for piece, ahead in itertools.pairwise(pieces):
        assert len(piece.outputs) <= 3  # the residual, and one or two of queries
        assert not ahead.attends or set(ahead.inputs) <= set(piece.outputs)
    assert sum(len(count_ops(piece.graph)) for piece in pieces if piece.attends) == len(model.layers)


def test_an_attention_that_does_more_is_a_piece_too(model) -> None:
    graph = trace(model)
    before = count_ops(graph)
    fusions = {name for name in fused_ops() if "batch" in load_op(name).parameters}
    assert beside_attention({*fusions, "add_rms_norm"}) == {"add_rms_norm"}
    rewrite(graph, fusions)
    pieces = split(graph)
    assert [piece.attends for piece in pieces] == [False, True] * len(model.layers) + [False]
    assert all(len(piece.outputs) == 1 for piece in pieces if piece.attends)
    assert count_ops(graph) == before or fusions


def test_a_piece_may_read_rows_only() -> None:
    class Model(torch.nn.Module):
        def forward(self, batch):
            return batch.token_ids + batch.seq_lens

    with pytest.raises(ValueError, match=r"batch\.seq_lens is read"):
        split(trace(Model()))


@pytest.mark.parametrize("num_single", [0, 2])
def test_rows_of_one_token_say_the_same(num_single) -> None:
    lengths, contexts = [*[1] * num_single, 3, 7], [*range(4, 4 + num_single), 3, 20]
    batch, _ = make_batch(lengths, contexts, 4, torch.Generator().manual_seed(3))
    apart = one_token_rows(batch)
    count = sum(lengths)
    assert apart.num_single == count == len(apart.query_lens) == len(apart.block_table)
    assert apart.query_start.tolist() == list(range(count + 1))
    owners = [row for row, length in enumerate(lengths) for _ in range(length)]
    spans = [c - q + i + 1 for q, c in zip(lengths, contexts) for i in range(q)]
    assert apart.seq_lens.tolist() == spans and apart.seq_lens.dtype == torch.int32
    assert torch.equal(apart.block_table, batch.block_table[owners])
    assert torch.equal(apart.ring_ids, batch.ring_ids[owners])
    assert apart.token_ids is batch.token_ids and apart.slot_mapping is batch.slot_mapping


def recorded_steps(forward, sizes=(1, 2, 3)) -> RecordedSteps:
    limits = BatchLimits(4, MAX_MODEL_LEN, 50)
    steps = RecordedSteps(forward, forward, sizes, limits, TapeRecorder(), {}, CPU)
    steps.capture()
    return steps


@torch.inference_mode()
def test_a_tape_records_steps_of_a_cpu() -> None:
    def forward(batch) -> torch.Tensor:
        rows = batch.token_ids * 1000 + batch.positions * 100 + batch.seq_lens * 10 + batch.block_table[:, 0]
        return rows.float().unsqueeze(1)

    steps = recorded_steps(forward)
    for contexts in ([3], [9, 2, 33], [40, 7], [3] * 5):
        batch, _ = make_batch([1] * len(contexts), contexts, 4, torch.Generator().manual_seed(sum(contexts)))
        batch.token_ids.copy_(torch.randint(9, batch.token_ids.shape))
        assert torch.equal(steps(batch), forward(batch))
    assert steps.counters == {"recorded_steps": 3}


def test_a_tape_refuses_a_kernel_that_looks_at_lengths() -> None:
    with pytest.raises(AskError, match="looks at lengths") as caught:
        recorded_steps(lambda batch: batch.positions + max(batch.context_lens))
    assert (caught.value.field, caught.value.hint) == ("recorded_steps", "--off recorded_steps")


def test_an_engine_runs_in_pieces(tmp_path, monkeypatch) -> None:
    """What build puts together, with a plan that this machine would not make."""
    path = str(tiny.write_checkpoint("deepseek-v2-lite", tmp_path))
    fields = {"dtype": "float32", "max_num_batched_tokens": 40, "max_num_seqs": 8, "max_model_len": 96}
    texts, greedy = (
        prompts(random.Random(), (60, 30, 1, 50)),
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    )
    plain = LLM(path, off=("native_kernels",), **fields)
    expected = [answer.outputs[0].token_ids for answer in plain.generate(texts, greedy, use_tqdm=False)]
    plain.shutdown()

    def planned(config, facts):
        made = make_plan(config, facts)
        rows = {**made.optimizations, "piecewise_graphs": True}
        return dataclasses.replace(made, optimizations=rows, graphs=GraphSizes(pieces=(1, 2, 4, 8, 16, 32)))

    monkeypatch.setattr("deepserve.llm.make_plan", planned)
    monkeypatch.setattr("deepserve.build.CudaRecorder", lambda device: Again())
    monkeypatch.setattr("deepserve.build.capturing", lambda *told: contextlib.nullcontext())
    llm = LLM(path, off=("native_kernels",), **fields)
    found = [answer.outputs[0].token_ids for answer in llm.generate(texts, greedy, use_tqdm=False)]
    counters, num_steps = llm.engine.counters, llm.engine.stats().num_steps
    llm.shutdown()
    assert found == expected
    assert 9 <= counters["piecewise_graphs"] < num_steps  # not those with 40 tokens


@pytest.mark.parametrize(("took", "warned"), [(1 << 29, False), (3 << 30, True), (-5, False)])
def test_what_recordings_took_is_told_and_compared(took, warned, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="deepserve"):
        capture.tell("29 sizes up to 256", 2.34, took, 2 << 30)
    assert "Graph capturing finished in 2.3 s, took" in caplog.text
    assert "(estimated 2.00 GiB), for 29 sizes up to 256" in caplog.text
    assert ("1.00 GiB more than" in caplog.text) == warned
