"""How many requests and tokens a step may hold, and how many tokens a block of the cache."""

from __future__ import annotations

import math

from deepserve.architecture import Architecture, Gqa, Mla
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.facts import Facts
from deepserve.hardware import Hardware
from deepserve.kv_cache.spec import block_multiple, cache_specs
from deepserve.optimizations import Decision
from deepserve.plan.graphs import choose_graphs, graph_mode
from deepserve.plan.memory import Load, MemoryMap, Wish, gib
from deepserve.plan.plan import Choice
from deepserve.sparse_attention import CompressedMqa
from deepserve.speculation import Speculation

# (requests, tokens) of a step and tokens of a block, where nothing is asked
CPU_SIZES = (64, 2048, 16)
GPU_SIZES = (256, 8192, 64)
COMPRESSED_BLOCK = 256  # tokens of a block that holds compressed entries: two of the ratio 128
ATTENTION_OPS: dict[type, str] = {
    Mla: "mla_attention", Gqa: "gqa_attention", CompressedMqa: "window_compressed_attention"
}  # fmt: skip
TOKENS_WITH_SCORES = 2048  # of a step, while the attention keeps a score for every pair of tokens


def choose_sizes(
    config: Config,
    facts: Facts,
    dtype: str,
    rows: dict[str, Decision],
    kernels: dict[str, str],
    speculation: Speculation | None,
) -> tuple[Load, Wish]:
    """What the memory has to hold and what is wished of the cache. AskError where sizes contradict."""
    default_seqs, default_tokens, default_block = _defaults(facts.hardware)
    chunked = rows["chunked_prefill"].on
    keeps_scores = kernels[_attention_op(facts.architecture.attention)] == "reference"
    if keeps_scores:
        default_tokens = min(default_tokens, TOKENS_WITH_SCORES)
    seqs = config.max_num_seqs or min(default_seqs, config.max_num_batched_tokens or default_seqs)
    tokens = config.max_num_batched_tokens or max(default_tokens, seqs)
    _check(config, facts, seqs, tokens, chunked)
    load = Load(
        facts.architecture, facts.hardware, dtype, config.tensor_parallel_size, rows["fp8_linear"].on, seqs, tokens,
        whole_prompts=not chunked, keeps_scores=keeps_scores, keeps_snapshots=rows["prefix_caching"].on,
        fixed_parts=rows["batch_invariant"].on,
        graphs=choose_graphs(config, rows, seqs, tokens),
        num_speculative_tokens=speculation.num_tokens if speculation else 0,
        with_mtp=speculation is not None and speculation.method == "mtp",
    )  # fmt: skip
    return load, Wish(
        config.block_size or _block_size(facts.architecture, default_block),
        config.kv_cache_memory_bytes,
        config.num_gpu_blocks_override,
        config.gpu_memory_utilization,
    )


def size_choices(config: Config, load: Load, wish: Wish, max_model_len: int) -> list[Choice]:
    """The sizes with their reasons, once the longest request is known."""
    default_seqs, default_tokens, _ = _defaults(load.hardware)
    seqs, tokens = load.max_num_seqs, load.batched_tokens(max_model_len)
    kind = why_tokens = f"the default of a {'CPU' if load.hardware.kind == 'cpu' else 'GPU'}"
    if tokens > load.max_num_batched_tokens:
        why_tokens = "a whole prompt: chunked prefill is off"
    elif load.keeps_scores and tokens == TOKENS_WITH_SCORES < default_tokens:
        why_tokens = "the reference attention keeps a score for every pair of tokens"
    elif tokens != default_tokens:
        why_tokens = "one for each of max_num_seqs"
    choices = (
        ("max_num_seqs", seqs, kind if seqs == default_seqs else "no more than max_num_batched_tokens"),
        ("max_num_batched_tokens", tokens, why_tokens),
        ("block_size", wish.block_size, kind if _multiple(load.architecture) == 1 else "whole entries of every ratio"),
    )
    return [
        Choice(name, str(value), "asked for" if getattr(config, name) else reason) for name, value, reason in choices
    ]


def ring_choices(load: Load, memory: MemoryMap) -> list[Choice]:
    """How many snapshots there are, where a cached prefix needs one to continue from."""
    if not memory.num_rings:
        return []
    snapshots, requests = memory.num_rings - load.max_num_seqs, load.max_num_seqs
    if not load.keeps_snapshots:
        return [Choice("ring_snapshots", "0", "prefix caching is off")]
    why = (
        "as many as requests"
        if snapshots == requests
        else f"what the longest requests leave of {gib(memory.kv_bytes)}, at least an eighth"
    )
    if load.whole_prompts:
        why += "; without chunked prefill they are taken only of prompts that end with a block, and while decoding"
    return [Choice("ring_snapshots", str(snapshots), why)]


def graph_choice(config: Config, load: Load, rows: dict[str, Decision]) -> Choice:
    """vLLM's CUDA graph mode, and the sizes."""
    mode = graph_mode(rows)
    if mode == "NONE":
        return Choice("cudagraph_mode", mode, "asked for" if config.cudagraph_mode else rows["cuda_graphs"].reason)
    reason = "asked for" if config.cudagraph_mode else "the rows that are on"
    return Choice("cudagraph_mode", mode, f"{reason}: {load.graphs}")


def _attention_op(attention: Mla | Gqa | CompressedMqa) -> str:
    if isinstance(attention, Mla) and attention.fp8_latents:
        return "mla_attention_fp8"
    return ATTENTION_OPS[type(attention)]


def _defaults(hardware: Hardware) -> tuple[int, int, int]:
    return CPU_SIZES if hardware.kind == "cpu" else GPU_SIZES


def _multiple(architecture: Architecture) -> int:
    return block_multiple(cache_specs(architecture, "bf16"))


def _block_size(architecture: Architecture, default: int) -> int:
    """Tokens of a block where nothing is asked: whole entries of every ratio, COMPRESSED_BLOCK if it holds such."""
    multiple = _multiple(architecture)
    return default if multiple == 1 else math.lcm(COMPRESSED_BLOCK, multiple)


def _check(config: Config, facts: Facts, seqs: int, tokens: int, chunked: bool) -> None:
    field = "max_num_batched_tokens"
    if tokens < seqs:
        raise AskError(f"is {tokens}, below max_num_seqs {seqs}", field=field, hint=f"{seqs} or more")
    if chunked:
        return
    if config.long_prefill_token_threshold:
        raise AskError("splits prompts, and chunked prefill is off", field="long_prefill_token_threshold")
    limit = config.max_model_len or facts.architecture.max_position_embeddings
    if config.max_num_batched_tokens and tokens < limit:
        why = f"is {tokens}; without chunked prefill a step must hold a prompt of {limit} tokens"
        raise AskError(why, field=field, hint=f"{limit} or more, or a smaller max_model_len")
