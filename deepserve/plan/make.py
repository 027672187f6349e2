"""make_plan: every choice once, each with its reason; what is impossible is refused with what would work."""

from __future__ import annotations

import dataclasses
from typing import Any

from deepserve.architecture import Architecture, Gqa, Mla
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.facts import Facts
from deepserve.kv_cache.spec import no_fp8
from deepserve.optimizations import FP8_CACHES, Decision, decide
from deepserve.plan.kernels import choose_kernels
from deepserve.plan.memory import Load, Wish, fits, fits_well, longest, memory_map
from deepserve.plan.parameters import count_parameters
from deepserve.plan.plan import Blocker, Choice, Plan, Recording
from deepserve.plan.sizes import choose_sizes, graph_choice, ring_choices, size_choices
from deepserve.plan.speculation import choose_speculation
from deepserve.sampling_params import SamplingParams

DTYPE_NAMES = {
    "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "half": "fp16", "fp16": "fp16", "float32": "fp32",
    "float": "fp32", "fp32": "fp32",
}  # fmt: skip
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def make_plan(config: Config, facts: Facts) -> Plan:
    """Decides everything. Pure: the same two values give the same plan. AskError names what cannot be."""
    architecture, eos_choice = _end_of_text(config, facts)
    _check_parallel(config, facts)
    dtype = _dtype(config, facts)
    rows = decide(config, facts, dtype.value)
    kv_dtype = _kv_dtype(config, facts, dtype.value, rows["fp8_kv_cache"])
    architecture = _as_cached(architecture, kv_dtype.value, rows["fp8_index_keys"].on)
    facts = dataclasses.replace(facts, architecture=architecture)
    kernels, kernel_choices = choose_kernels(config, facts, dtype.value, rows)
    speculation, drafts = choose_speculation(config, facts, rows)
    load, wish = choose_sizes(config, facts, dtype.value, rows, kernels, speculation)
    length = _max_model_len(config, architecture, load, wish)
    max_model_len = int(length.value)
    memory, num_blocks = memory_map(load, wish, max_model_len)
    sampling, sampling_choice = _default_sampling(config, facts)
    checkpoint = facts.checkpoint
    return Plan(
        model=config.model,
        model_path=checkpoint.path,
        tokenizer_path=config.tokenizer or (checkpoint.path if checkpoint.has_tokenizer else None),
        served_model_name=config.served_model_name or (config.model,),
        architecture=architecture,
        parameters=count_parameters(architecture),
        hardware=facts.hardware,
        device=facts.hardware.device,
        num_threads=max(facts.hardware.num_cores, 1),
        dtype=dtype.value,
        kv_dtype=kv_dtype.value,
        load_format="dummy" if config.load_format == "dummy" else "safetensors",
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=max_model_len,
        block_size=wish.block_size,
        num_blocks=num_blocks,
        graphs=load.graphs,
        max_num_seqs=load.max_num_seqs,
        max_num_batched_tokens=load.batched_tokens(max_model_len),
        enable_chunked_prefill=rows["chunked_prefill"].on,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        enable_prefix_caching=rows["prefix_caching"].on,
        scheduling_policy=config.scheduling_policy,
        async_depth=int(rows["async_scheduling"].on),
        speculation=speculation,
        max_num_queued_reqs=config.max_num_queued_reqs,
        stream_interval=config.stream_interval,
        max_logprobs=config.max_logprobs,
        kernels=kernels,
        optimizations={name: decision.on for name, decision in rows.items()},
        default_sampling=sampling,
        memory=memory,
        choices=(
            _device(facts), dtype, kv_dtype, _weights(config, facts, dtype.value, rows), *_parallel(config, facts),
            length, *size_choices(config, load, wish, max_model_len), *ring_choices(load, memory), *drafts,
            graph_choice(config, load, rows), eos_choice, sampling_choice, *kernel_choices, *_row_choices(rows),
        ),
        blockers=tuple(_blockers(config, facts)),
        seed=config.seed,
        recording=_recording(config),
    )  # fmt: skip


def _end_of_text(config: Config, facts: Facts) -> tuple[Architecture, Choice]:
    """The architecture with every end-of-text id: config.json's, then those that generation_config.json adds."""
    ids = facts.architecture.eos_token_ids
    source = "config.json"
    more = facts.checkpoint.generation_config.get("eos_token_id") if config.generation_config == "auto" else None
    more = [] if more is None else more if isinstance(more, list) else [more]
    if not all(isinstance(token, int) and 0 <= token < facts.architecture.vocab_size for token in (*ids, *more)):
        raise AskError(f"{[*ids, *more]} are not all tokens", field="eos_token_id")
    if set(more) - set(ids):
        ids, source = (*ids, *(token for token in more if token not in ids)), "config.json and generation_config.json"
    return (
        dataclasses.replace(facts.architecture, eos_token_ids=ids),
        Choice("end_of_text", " ".join(map(str, ids)) or "none", source),
    )


def _as_cached(architecture: Architecture, kv_dtype: str, fp8_index_keys: bool) -> Architecture:
    attention = architecture.attention
    if isinstance(attention, Mla) and kv_dtype.startswith("fp8"):
        attention = dataclasses.replace(attention, fp8_latents=kv_dtype)
    if isinstance(attention, Mla) and attention.indexer and fp8_index_keys:
        attention = dataclasses.replace(attention, indexer=dataclasses.replace(attention.indexer, fp8_keys=True))
    return dataclasses.replace(architecture, attention=attention)


def _device(facts: Facts) -> Choice:
    hardware = facts.hardware
    if facts.hypothetical:
        return Choice("hardware", hardware.label, "asked for; this machine was not looked at")
    return Choice("hardware", hardware.label, "the GPUs here" if hardware.device == "cuda" else "the CPU here")


def _dtype(config: Config, facts: Facts) -> Choice:
    """What is computed in: as asked, else the checkpoint's where the machine has instructions for it."""
    own, hardware = facts.architecture.dtype, facts.hardware
    if config.dtype != "auto":
        return Choice("dtype", DTYPE_NAMES[config.dtype], "asked for")
    if hardware.kind != "cpu" or own == "fp32":
        return Choice("dtype", own, "the checkpoint's")
    fast = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16"}}[own] & hardware.features
    if fast:
        return Choice("dtype", own, f"the checkpoint's, and this CPU has {', '.join(sorted(fast))}")
    return Choice("dtype", "fp32", "exact for the checkpoint", {own: f"this CPU has no {own} instructions"})


def _kv_dtype(config: Config, facts: Facts, dtype: str, row: Decision) -> Choice:
    """What is cached, in a machine's own FP8 where that is asked for."""
    asked = DTYPE_NAMES.get(config.kv_cache_dtype, config.kv_cache_dtype)
    if asked not in ("auto", dtype, *FP8_CACHES):
        raise AskError(
            f"{config.kv_cache_dtype!r} is not served: no attention kernel reads it",
            field="kv_cache_dtype",
            hint=f"auto or {dtype}" if no_fp8(facts.architecture.attention) else f"auto, {dtype} or fp8, which is e4m3",
        )
    if row.on:
        rest = f"latents; their rope channels in {dtype}, with an fp32 scale a token"
        return Choice("kv_cache_dtype", facts.hardware.fp8_format, f"fp8_kv_cache is on: {rest}")
    return Choice("kv_cache_dtype", dtype, "what is computed in", {"fp8": row.reason})


def _weights(config: Config, facts: Facts, dtype: str, rows: dict[str, Decision]) -> Choice:
    quantization = facts.architecture.quantization
    if config.quantization not in (None, "fp8") or (config.quantization and not quantization):
        stored = "FP8 in blocks (fp8)" if quantization else "not quantised"
        raise AskError(
            f"is {config.quantization!r}, and the checkpoint is {stored}", field="quantization", hint="leave it out"
        )
    if config.load_format == "dummy":
        return Choice("weights", "random", "load_format dummy")
    if quantization is None:
        return Choice("weights", dtype, "the checkpoint is not quantised")
    if rows["fp8_linear"].on:
        return Choice("weights", "fp8", f"as in the checkpoint, routed experts and kv_b in {dtype}: fp8_linear is on")
    return Choice("weights", dtype, "FP8 blocks are expanded while loading", {"fp8": "fp8_linear is off"})


def _check_parallel(config: Config, facts: Facts) -> None:
    size, hardware, attention = config.tensor_parallel_size, facts.hardware, facts.architecture.attention
    if config.device == "cuda" and hardware.device == "cpu":
        raise AskError("torch sees no GPU here", field="device", hint="--device cpu, or plan with --hardware mi300x:8")
    if config.device == "cpu" and hardware.device == "cuda":
        raise AskError(f"is cpu, and the hardware is {hardware.label}", field="device")
    if size > hardware.count:
        raise AskError(f"is {size}, and there is {hardware.label}", field="tensor_parallel_size")
    heads = attention.num_heads
    moe = facts.architecture.moe
    kv_heads = attention.num_kv_heads if isinstance(attention, Gqa) else size
    if heads % size or (kv_heads % size and size % kv_heads) or (moe and moe.intermediate_size % size):
        works = [n for n in range(1, hardware.count + 1) if heads % n == 0 and not (moe and moe.intermediate_size % n)]
        raise AskError(
            f"{size} ranks cannot share {heads} heads evenly", field="tensor_parallel_size", hint=f"would work: {works}"
        )


def _parallel(config: Config, facts: Facts) -> list[Choice]:
    size, attention = config.tensor_parallel_size, facts.architecture.attention
    if size == 1:
        return []
    cache = "every rank keeps the whole latent cache: all its heads read it"
    if isinstance(attention, Gqa):
        own = max(1, attention.num_kv_heads // size)
        cache = f"a rank caches {own} of {attention.num_kv_heads} K/V heads"
    return [Choice("tensor_parallel_size", str(size), f"heads, MLPs, experts and vocabulary are divided; {cache}")]


def _max_model_len(config: Config, architecture: Architecture, load: Load, wish: Wish) -> Choice:
    limit = architecture.max_position_embeddings
    if config.max_model_len is not None:
        if config.max_model_len > limit:
            raise AskError(
                f"is {config.max_model_len}, and the model has {limit} positions",
                field="max_model_len",
                hint=f"at most {limit}",
            )
        return Choice("max_model_len", str(config.max_model_len), "asked for")
    length = longest(limit, lambda candidate: fits_well(load, wish, candidate))
    length = length or longest(limit, lambda candidate: fits(load, wish, candidate))
    if length in (0, limit):  # where nothing fits, memory_map says so
        return Choice("max_model_len", str(limit), "the model's limit")
    length -= length % wish.block_size if length >= wish.block_size else 0
    refused = {str(limit): "its cache and workspace do not fit"}
    return Choice("max_model_len", str(length), "the longest that leaves room for the cache", refused)


def _default_sampling(config: Config, facts: Facts) -> tuple[dict[str, Any], Choice]:
    """What generation_config.json sets where a request says nothing, checked as a request would be."""
    if config.generation_config != "auto":
        return {}, Choice("sampling", "the API's", "generation_config vllm")
    found = facts.checkpoint.generation_config
    sampling = {key: found[key] for key in SAMPLING_KEYS if found.get(key) is not None}
    try:
        SamplingParams(**sampling)
    except AskError as error:
        raise AskError(
            error.message, field=f"generation_config.json: {error.field}", hint="--generation-config vllm"
        ) from None
    text = " ".join(f"{key}={value}" for key, value in sampling.items())
    return sampling, Choice(
        "sampling", text or "the API's", "generation_config.json" if sampling else "the checkpoint sets none"
    )


def _recording(config: Config) -> Recording:
    if config.trace_ops and not config.trace_file:
        raise AskError("there is no timeline for them", field="trace_ops", hint="--trace-file FILE")
    return Recording(config.trace_file, config.trace_ops, config.capture_shapes)


def _row_choices(rows: dict[str, Decision]) -> list[Choice]:
    return [Choice(f"optimization {name}", "on" if row.on else "off", row.reason) for name, row in rows.items()]


def _blockers(config: Config, facts: Facts) -> list[Blocker]:
    """Why this can be planned and not run."""
    found = []
    if config.tensor_parallel_size > 1:
        found.append(
            Blocker(
                "tensor_parallel_size",
                f"is {config.tensor_parallel_size}: one process drives one device, and no more than that is built",
                "tensor_parallel_size 1",
            )
        )
    if facts.hypothetical:
        found.append(Blocker("hardware", f"{facts.hardware.label} is planned for, not this machine"))
    if not facts.checkpoint.has_weights and config.load_format != "dummy":
        where = facts.checkpoint.path or config.model
        hint = "download the checkpoint" + (", or --load-format dummy" if facts.checkpoint.path else "")
        found.append(Blocker("model", f"{where} has no *.safetensors, and pickled weights are never loaded", hint))
    return found
