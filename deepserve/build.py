"""The composition root: the only file that reads the plan's switches and puts objects together."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from deepserve.architecture import Gqa
from deepserve.conditions import no_lengths_on_the_host
from deepserve.dtypes import TORCH_DTYPES
from deepserve.engine.admission import RequestLimits
from deepserve.engine.engine import Engine
from deepserve.engine.executor import Executor
from deepserve.graph.bind import BoundGraph, bind
from deepserve.graph.dense import make_dense
from deepserve.graph.pieces import BoundPiece, beside_attention, bind_pieces
from deepserve.graph.rewrite import rewrite
from deepserve.graph.show import count_ops
from deepserve.graph.trace import trace
from deepserve.kv_cache.manager import KvCacheManager
from deepserve.kv_cache.rings import Rings
from deepserve.kv_cache.spec import cache_specs
from deepserve.kv_cache.tensors import allocate
from deepserve.layers.caches import place
from deepserve.log import get_logger
from deepserve.models.decoder import Decoder
from deepserve.models.registry import build_model
from deepserve.models.weights import fill_dummy, load_weights
from deepserve.ops.launch import OVERLAP
from deepserve.ops.op import Kernel
from deepserve.optimizations import TABLE
from deepserve.plan import Plan
from deepserve.recording.kernels import CompiledKernels
from deepserve.recording.recorders import Recorders
from deepserve.runner.capture import CudaRecorder, capturing
from deepserve.runner.dense import DenseWhereShort
from deepserve.runner.graphs import DecodeGraphs, Forward, MixedGraphs
from deepserve.runner.model_runner import ModelRunner
from deepserve.runner.padding import BatchLimits
from deepserve.runner.pieces import PiecewiseGraphs
from deepserve.runner.recorded import RecordedSteps, TapeRecorder
from deepserve.runner.rings import RingCopier
from deepserve.runner.slots import Slots
from deepserve.runner.warm_up import warm_up, warm_up_sizes
from deepserve.sampling.grammar import Grammars
from deepserve.sampling.sampler import Sampler
from deepserve.scheduler.budget import StepLimits
from deepserve.scheduler.scheduler import Scheduler
from deepserve.spec_decode.mtp import MtpProposer
from deepserve.spec_decode.ngram import NgramProposer
from deepserve.spec_decode.proposer import Proposer
from deepserve.speculation import Speculation

log = get_logger(__name__)

OnPhase = Callable[[str, float], None]  # name of a phase that is over, and its seconds


class _Phases:
    """Times the phases of a start; told to the log and to `on_phase`."""

    def __init__(self, on_phase: OnPhase | None):
        self.on_phase = on_phase
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        if self.on_phase is not None:
            self.on_phase(name, self.seconds[name])


def build_engine(plan: Plan, on_phase: OnPhase | None = None) -> Engine:
    """An engine that has run its first steps. AskError where the plan cannot run here.

    Its counters have, by row of the optimizations, how often each is in the graph.
    """
    plan.refuse_blockers()
    phase = _Phases(on_phase)
    device = torch.device(plan.device)
    compiled = CompiledKernels() if plan.device == "cuda" else None
    if plan.device == "cpu":
        _set_threads(plan.num_threads)
    model = _load_model(plan, device, phase)
    with phase("kv cache"):
        specs = cache_specs(plan.architecture, plan.dtype, plan.num_drafts, plan.with_mtp)
        # A block and a ring that padding rows and steps that are being recorded write to.
        padding = int(bool(plan.graphs.whole or plan.graphs.pieces))
        num_blocks, num_rings = plan.num_blocks + padding, plan.memory.num_rings + padding
        tensors = allocate(specs, num_blocks, plan.block_size, device, num_rings)
        place(specs, tensors, model.attention_caches)
        rings = RingCopier([tensor for spec, tensor in zip(specs, tensors) if spec.ring])
        recorders = Recorders(plan, [tensor for spec, tensor in zip(specs, tensors) if not spec.ring])
    for line in plan.log_lines:
        log.info(line)
    OVERLAP.on, OVERLAP.count = plan.optimizations["overlapped_launches"], 0
    with phase("graph"):
        packed: dict[Any, Any] = {}
        (forward, logits, *mtp), counters = _bind(plan, model, packed, recorders)
        dense = _bind_dense(plan, model, packed, recorders) if plan.optimizations["skip_indexer"] else None
        in_fp8 = Counter(spec.kind for spec in specs if spec.dtype == "bytes")
        counters.update(fp8_kv_cache=in_fp8["mla_latent"], fp8_index_keys=in_fp8["index_keys"])
    argmax, sample = (recorders.load(op, plan.kernels[op]).function for op in ("argmax", "sample"))
    vocab_size = plan.architecture.vocab_size
    grammars = Grammars(plan.tokenizer_path, vocab_size, plan.architecture.eos_token_ids)
    slots = Slots(plan.max_num_seqs, plan.max_model_len, plan.block_size, vocab_size, device, plan.seed, grammars)
    proposer = _proposer(plan.speculation, mtp, argmax, slots) if plan.speculation else None
    runner = ModelRunner(forward, logits, Sampler(argmax, sample), slots, proposer, rings)
    with phase("warm-up"):
        _warm_up(plan, runner)
        if dense is not None:
            runner.forward = dense
            _warm_up(plan, runner)
            runner.forward = DenseWhereShort(dense, forward, _dense_length(plan), counters)
    if plan.optimizations["recorded_steps"]:
        with phase("recorded steps"):
            runner.forward = _record_steps(plan, runner.forward, counters)
    elif padding:
        with phase("graphs"), capturing(str(plan.graphs), plan.memory.graph_bytes):
            pieces = _bind_pieces(plan, model, packed, recorders) if plan.graphs.pieces else []
            runner.forward = _record_graphs(plan, runner.forward, pieces, counters)
    counters["overlapped_launches"] = OVERLAP.count
    total = sum(phase.seconds.values())
    log.info("init engine (load model, create kv cache, bind graph, warmup model) took %.2f s", total)
    executor = Executor(runner, plan.async_depth)
    engine = Engine(_scheduler(plan), executor, RequestLimits.of(plan), counters, grammars)
    recorders.start(engine, runner)
    if compiled is not None:
        compiled.start(counters)
    return engine


def _warm_up(plan: Plan, runner: ModelRunner) -> None:
    """A request; on a GPU also steps of every size that later compile nothing (where no kernel asks how long they are,
    for those that do are PyTorch's)."""
    warm_up(runner, min(plan.max_num_batched_tokens, plan.max_model_len - 1, plan.num_blocks * plan.block_size - 1))
    if plan.device == "cuda" and no_lengths_on_the_host(plan.architecture) is None:
        most = min(plan.max_num_batched_tokens, plan.max_num_seqs * (plan.max_model_len - 1))
        warm_up_sizes(runner, most)


def _record_steps(plan: Plan, forward: Forward, counters: Counter[str]) -> Forward:
    """The forward of a CPU, with its small decode steps replayed."""
    steps = RecordedSteps(
        forward, forward, plan.graphs.whole, _limits(plan), TapeRecorder(), counters, torch.device(plan.device)
    )
    steps.capture()
    return steps


def _record_graphs(plan: Plan, forward: Forward, pieces: list[BoundPiece], counters: Counter[str]) -> Forward:
    """The forward of a GPU, with what the plan records of it replayed."""
    device, limits, rest = torch.device(plan.device), _limits(plan), forward
    recorder = CudaRecorder(device)
    if plan.optimizations["piecewise_graphs"]:
        rest = PiecewiseGraphs(forward, pieces, plan.graphs.pieces, limits, recorder, counters, device)
        rest.capture()
    if plan.optimizations["cuda_graphs"]:
        rest = DecodeGraphs(forward, rest, plan.graphs.whole, limits, recorder, counters, device)
        rest.capture()
        if plan.optimizations["mixed_graphs"]:
            rest = MixedGraphs(rest, counters)
    return rest


def _limits(plan: Plan) -> BatchLimits:
    return BatchLimits(plan.block_size, plan.max_model_len, plan.num_blocks, plan.memory.num_rings)


def _load_model(plan: Plan, device: torch.device, phase: _Phases) -> Decoder:
    with phase("model"):
        dtype = TORCH_DTYPES[plan.dtype]
        # Angles of the positions that requests can have, not of all that the model knows.
        architecture = replace(plan.architecture, max_position_embeddings=plan.max_model_len)
        model = build_model(architecture, dtype, device, plan.optimizations["fp8_linear"], plan.with_mtp)
    with phase("weights"):
        if plan.load_format == "dummy":
            fill_dummy(model, plan.seed)
        else:
            load_weights(model, plan.model_path or "")
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    log.info("Loading weights took %.2f seconds", phase.seconds["weights"])
    log.info("Model loading took %.2f GiB memory", num_bytes / 2**30)
    return model


def _set_threads(num_threads: int) -> None:
    """The plan's threads, or fewer where OMP_NUM_THREADS (which torch has read) says so."""
    allowed = torch.get_num_threads()
    if allowed < num_threads:
        log.info("torch may use %d threads, the plan's are %d (OMP_NUM_THREADS?)", allowed, num_threads)
    torch.set_num_threads(min(num_threads, allowed))


def _scheduler(plan: Plan) -> Scheduler:
    limits = StepLimits(
        plan.max_num_seqs, plan.max_num_batched_tokens, plan.long_prefill_token_threshold, plan.enable_chunked_prefill
    )
    num_rings = plan.memory.num_rings
    rings = Rings(num_rings, plan.max_num_seqs, plan.num_drafts) if num_rings else None
    cache = KvCacheManager(plan.num_blocks, plan.block_size, plan.enable_prefix_caching, rings)
    return Scheduler(limits, cache, plan.architecture.eos_token_ids, plan.scheduling_policy)


def _dense_length(plan: Plan) -> int:
    attention = plan.architecture.attention
    assert not isinstance(attention, Gqa) and attention.dense_length is not None
    return attention.dense_length


def _proposer(speculation: Speculation, mtp: list[BoundGraph], argmax: Callable[..., Any], slots: Slots) -> Proposer:
    if speculation.method == "ngram":
        return NgramProposer(slots, speculation)
    forward, logits = mtp
    return MtpProposer(forward, logits, argmax, slots, speculation.num_tokens)


def _bind(
    plan: Plan, model: Decoder, packed: dict[Any, Any], recorders: Recorders
) -> tuple[list[BoundGraph], Counter[str]]:
    """Forward and logits of the model, and of its MTP layer if it has one, with the plan's kernels, and the counters
    that prove what is in these graphs."""
    parts = [model] if model.mtp is None else [model, model.mtp]
    graphs = [trace(part, method) for part in parts for method in ("forward", "logits")]
    fired = [rewrite(graph, plan.fusions) for graph in graphs]
    calls: Counter[str] = Counter()
    for graph in graphs:
        calls.update(count_ops(graph))
    counters: Counter[str] = Counter()
    for row in TABLE:
        if row.fuses:
            counters[row.name] = sum(one.get(row.fuses, 0) for one in fired)
        elif row.kernels:
            counters[row.name] = sum(count for op, count in calls.items() if plan.kernels[op] in row.kernels)
    counters["fp8_linear"] = calls["linear_fp8_block"]
    return [_bound(plan, graph, packed, recorders) for graph in graphs], counters


def _bind_dense(plan: Plan, model: Decoder, packed: dict[Any, Any], recorders: Recorders) -> BoundGraph:
    """The model without its indexer, for steps of short requests."""
    graph = trace(model)
    make_dense(graph)
    rewrite(graph, plan.fusions)
    return _bound(plan, graph, packed, recorders)


def _bind_pieces(plan: Plan, model: Decoder, packed: dict[Any, Any], recorders: Recorders) -> list[BoundPiece]:
    """The model's forward once more, in pieces."""
    graph = trace(model)
    rewrite(graph, beside_attention(plan.fusions))
    return bind_pieces(graph, _kernels(plan, graph, recorders), packed)


def _bound(plan: Plan, graph: fx.GraphModule, packed: dict[Any, Any], recorders: Recorders) -> BoundGraph:
    return bind(graph, _kernels(plan, graph, recorders), packed)


def _kernels(plan: Plan, graph: fx.GraphModule, recorders: Recorders) -> dict[str, Kernel]:
    return {op: recorders.load(op, plan.kernels[op]) for op in count_ops(graph)}
