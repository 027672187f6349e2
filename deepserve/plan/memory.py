"""Where the memory of one device goes: weights, workspace, KV cache, and how many tokens and requests that holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from deepserve.architecture import Architecture, Gqa, Mla
from deepserve.errors import AskError
from deepserve.hardware import GIB, TABLE, Hardware
from deepserve.kv_cache.spec import (
    DTYPE_BYTES,
    EXPANDED_BYTES,
    FIXED_BYTES,
    CacheSpec,
    block_multiple,
    bytes_per_token,
    cache_specs,
    ring_bytes,
)
from deepserve.plan.graphs import GraphSizes
from deepserve.plan.parameters import weight_bytes
from deepserve.sparse_attention import CompressedMqa

CPU_KV_SHARE = 0.4
CPU_KV_LIMIT = 8 * GIB
SNAPSHOT_SHARE = 8  # of the cache: one in so many bytes
SPARSE_BYTES = 256 << 20  # of index scores and of gathered latents that attention over chosen tokens works on at a time
GPU_RUNTIME_BYTES = 6 * GIB // 5  # driver context, allocator slack, library handles
# Of CUDA graphs. On an H100 29 of them with about 350 kernels in 27 layers took 0.3 GiB, their results included.
KERNELS_A_LAYER = 13
KERNEL_BYTES = 28 << 10
GRAPH_BYTES = 256 << 10  # whatever is in it
LIBRARY_BYTES = 64 << 20  # workspaces of matrix products, where they are recorded


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Bytes of one device (of the CPU's memory where that computes). `num_tokens` fit into the blocks of `kv_bytes`.

    A ring is what a request caches whatever its length: one for each of max_num_seqs, the others for snapshots.
    """

    total_bytes: int
    budget_bytes: int  # what may be used: the rest is left to others
    weight_bytes: int
    workspace_bytes: int  # estimated peak of activations, logits and per-request state
    graph_bytes: int  # estimate of what recorded steps take
    kv_bytes: int
    kv_bytes_per_token: int
    ring_bytes: int  # of one
    num_rings: int
    num_tokens: int
    concurrency: float  # requests of max_model_len that fit at once

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self.budget_bytes - self.weight_bytes - self.workspace_bytes - self.graph_bytes - self.kv_bytes


@dataclass(frozen=True, slots=True)
class Load:
    """What the memory has to hold, besides the tokens that are still to be counted."""

    architecture: Architecture
    hardware: Hardware
    dtype: str  # of weights and activations, and of the cache where the architecture does not say FP8
    tensor_parallel_size: int
    keep_fp8: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    whole_prompts: bool  # no chunked prefill: a step must hold the longest prompt
    keeps_scores: bool  # the reference attention: fp32 scores of every head, new token and token of its context
    keeps_snapshots: bool  # of rings, for cached prefixes to continue from
    fixed_parts: bool  # attention keeps results of parts of every context
    graphs: GraphSizes
    num_speculative_tokens: int = 0
    with_mtp: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of one rank's weights."""
        return weight_bytes(self.architecture, self.dtype, self.tensor_parallel_size, self.keep_fp8, self.with_mtp)

    @property
    def specs(self) -> list[CacheSpec]:
        """What one rank caches: latents, entries and rings whole on every rank, K/V heads divided among them."""
        specs = cache_specs(self.architecture, self.dtype, self.num_speculative_tokens, self.with_mtp)
        attention = self.architecture.attention
        if isinstance(attention, Gqa):
            heads = math.ceil(attention.num_kv_heads / self.tensor_parallel_size)
            return [dataclasses.replace(spec, row=(2, heads, attention.head_dim)) for spec in specs]
        return specs

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a rank's blocks for a token, rounded up where it is a part of an entry."""
        return bytes_per_token(self.specs)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block on one rank."""
        return sum(spec.block_bytes(block_size) for spec in self.specs)

    @property
    def ring_bytes(self) -> int:
        """Bytes of a ring on one rank; 0 where the model has none."""
        return ring_bytes(self.specs)

    def batched_tokens(self, max_model_len: int) -> int:
        """Most tokens of a step."""
        return max(self.max_num_batched_tokens, max_model_len) if self.whole_prompts else self.max_num_batched_tokens

    def workspace_bytes(self, max_model_len: int) -> int:
        """An estimate of the peak beside weights and cache: the widest layer of a full step, one long request's keys,
        values and mask (with the reference attention its scores), fp32 logits thrice, the slots' tokens and blocks, the
        angles of every position."""
        a, size = self.architecture, DTYPE_BYTES[self.dtype]
        tokens = min(self.batched_tokens(max_model_len), self.max_num_seqs * max_model_len)
        heads = a.attention.num_heads / self.tensor_parallel_size
        if isinstance(a.attention, Mla):
            width = heads * (a.attention.nope_dim + a.attention.rope_dim + a.attention.v_dim)
        elif isinstance(a.attention, CompressedMqa):
            width = 2 * a.attention.head_dim
        else:
            width = 2 * heads * a.attention.head_dim
        pair = 3 * 4 * heads if self.keeps_scores else 1
        seen, sparse = max_model_len, 0.0
        if isinstance(a.attention, Mla) and (indexer := a.attention.indexer):
            seen = min(seen, indexer.top_k)
            sparse = 12 * tokens * seen + 4 * max_model_len * indexer.head_dim + SPARSE_BYTES
        queries = min(tokens, seen)
        if isinstance(a.attention, CompressedMqa):
            seen, sparse = a.attention.num_keys(max_model_len), SPARSE_BYTES
        context = seen * (width * size + queries * pair)
        if isinstance(a.attention, Mla) and self.hardware.kind != "cpu" and not self.keeps_scores:
            context = min(context, EXPANDED_BYTES + 8 * tokens * heads * a.attention.v_dim)  # fp32 results of slices
        logits = 3 * 4 * min(self.max_num_seqs * (1 + self.num_speculative_tokens), tokens) * a.vocab_size
        tables = a.rope.dim * (1 + (a.compress_rope is not None))
        slots = 4 * max_model_len * (2 * self.max_num_seqs + tables)
        parts = FIXED_BYTES if self.fixed_parts else 0
        runtime = 0 if self.hardware.kind == "cpu" else GPU_RUNTIME_BYTES
        return int(self.layer_bytes(tokens) + context + sparse + logits + slots) + parts + runtime

    def layer_bytes(self, tokens: int) -> float:
        """Of what is alive at a time in the widest layer of a step, attention's context apart."""
        a = self.architecture
        heads = a.attention.num_heads / self.tensor_parallel_size
        widest = 3 * a.intermediate_size / self.tensor_parallel_size
        if a.moe is not None:
            expert = 3 * a.moe.intermediate_size / self.tensor_parallel_size + a.hidden_size
            widest = max(widest, a.moe.top_k * expert)
        if isinstance(a.attention, Mla):
            widest = max(widest, 2 * heads * (a.attention.nope_dim + a.attention.rope_dim))
        elif isinstance(a.attention, CompressedMqa):
            widest = max(widest, 2 * heads * a.attention.head_dim)
        streams = 4 * a.hyper_connections.num_streams if a.hyper_connections else 0
        return tokens * ((4 + streams) * a.hidden_size + widest) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked of the cache: its bytes or blocks (None: what is free), and the share of a GPU to use."""

    block_size: int
    kv_bytes: int | None
    num_blocks: int | None
    utilization: float


def budget_bytes(hardware: Hardware, utilization: float) -> int:
    """What the engine may use: a share of a GPU, less what others hold of it; of a CPU's memory what is free."""
    if hardware.kind == "cpu":
        return hardware.available_bytes
    return min(int(hardware.memory_bytes * utilization), hardware.available_bytes)


def kv_room(load: Load, wish: Wish, max_model_len: int) -> int:
    """Bytes that the KV cache gets; negative where weights and workspace alone are too much."""
    spare, asked = spare_bytes(load, wish, max_model_len), asked_bytes(load, wish)
    if asked is not None:
        return asked if asked <= spare else spare
    if load.hardware.kind != "cpu" or spare < 0:
        return spare
    useful = most_bytes(load, wish, max_model_len) + load.max_num_seqs * load.ring_bytes * (1 + load.keeps_snapshots)
    return min(int(spare * CPU_KV_SHARE), CPU_KV_LIMIT, useful)


def graph_bytes(load: Load, wish: Wish, max_model_len: int) -> int:
    """An estimate of what CUDA graphs take: each kernel and each graph something, one pass of the largest size its
    results, whole steps what their attention mixes (fp32) and block tables."""
    whole, pieces = load.graphs.whole, load.graphs.pieces
    if load.hardware.kind == "cpu" or not (whole or pieces):
        return 0
    attention, layers, rows = load.architecture.attention, load.architecture.num_layers, max(whole, default=0)
    kernels = layers * KERNELS_A_LAYER * (len(whole) + len(pieces)) * KERNEL_BYTES
    graphs = (len(whole) + len(pieces) * (layers + 1)) * GRAPH_BYTES
    width = attention.kv_rank if isinstance(attention, Mla) else attention.head_dim
    mixed = 4 * rows * width * attention.num_heads / load.tensor_parallel_size
    tables = 4 * rows * math.ceil(max_model_len / wish.block_size)
    return int(kernels + graphs + load.layer_bytes(max(*whole, *pieces, 1)) + mixed + tables) + LIBRARY_BYTES


def spare_bytes(load: Load, wish: Wish, max_model_len: int) -> int:
    """What weights, workspace and recorded steps leave."""
    fixed = load.weight_bytes + load.workspace_bytes(max_model_len) + graph_bytes(load, wish, max_model_len)
    return budget_bytes(load.hardware, wish.utilization) - fixed


def asked_bytes(load: Load, wish: Wish) -> int | None:
    """What was asked of the cache in bytes, a ring for each request included; None where it takes what is free."""
    if wish.num_blocks is None:
        return wish.kv_bytes
    return wish.num_blocks * load.block_bytes(wish.block_size) + load.max_num_seqs * load.ring_bytes


def most_bytes(load: Load, wish: Wish, max_model_len: int) -> int:
    """Of the blocks that the longest requests fill when there are as many as there may be."""
    return load.max_num_seqs * math.ceil(max_model_len / wish.block_size) * load.block_bytes(wish.block_size)


def cache_counts(load: Load, wish: Wish, max_model_len: int) -> tuple[int, int]:
    """Whole blocks and rings in that room: a ring for each request, and up to as many for snapshots.

    Snapshots get what the longest requests would leave, at least an eighth; beside blocks that were asked for, what is
    free.
    """
    room, ring = max(kv_room(load, wish, max_model_len), 0), load.ring_bytes
    left, snapshots = room - load.max_num_seqs * ring, 0
    if ring and load.keeps_snapshots:
        share = max(room // SNAPSHOT_SHARE, left - most_bytes(load, wish, max_model_len))
        if wish.num_blocks is not None:
            share = spare_bytes(load, wish, max_model_len) - room
        snapshots = max(0, min(load.max_num_seqs, share // ring))
        left -= 0 if wish.num_blocks is not None else snapshots * ring
    blocks = max(left, 0) // load.block_bytes(wish.block_size)
    return blocks, load.max_num_seqs + snapshots if ring else 0


def fits(load: Load, wish: Wish, max_model_len: int) -> bool:
    """Whether one request of that length fits."""
    return cache_counts(load, wish, max_model_len)[0] * wish.block_size >= max_model_len


def fits_well(load: Load, wish: Wish, max_model_len: int) -> bool:
    """Whether it fits and the workspace takes no more than half of what the weights leave."""
    left = budget_bytes(load.hardware, wish.utilization) - load.weight_bytes
    return fits(load, wish, max_model_len) and load.workspace_bytes(max_model_len) <= left // 2


def longest(limit: int, good: Callable[[int], bool]) -> int:
    """The largest length up to `limit` that is good, where no longer one than a bad one is; 0 where none is."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2 if high <= limit else limit
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def memory_map(load: Load, wish: Wish, max_model_len: int) -> tuple[MemoryMap, int]:
    """The map and its number of blocks. AskError, with what would work, where one request does not fit."""
    _check_block_size(load, wish.block_size)
    budget, weights, workspace = budget_bytes(load.hardware, wish.utilization), load.weight_bytes, load.workspace_bytes
    (blocks, rings), name = cache_counts(load, wish, max_model_len), load.hardware.name
    if weights >= budget:
        raise AskError(
            f"its weights take {gib(weights)} of each device, and {name} has {gib(budget)} to use",
            field="model",
            hint="for requests of 4,096 tokens " + remedies(load, wish, min(max_model_len, 4096)),
        )
    spare, asked = spare_bytes(load, wish, max_model_len), asked_bytes(load, wish)
    beside = f"{gib(workspace(max_model_len))} of workspace"
    if graphs := graph_bytes(load, wish, max_model_len):
        beside += f" and {gib(graphs)} of recorded steps"
    if asked is not None and asked > spare:
        raise AskError(
            f"asks for {gib(asked)} of KV cache, and {gib(max(spare, 0))} are left of {name} after {gib(weights)} of "
            f"weights and {beside}",
            field="kv_cache_memory_bytes" if wish.num_blocks is None else "num_gpu_blocks_override",
            hint=remedies(load, wish, max_model_len),
        )
    if blocks * wish.block_size < max_model_len:
        needed = math.ceil(max_model_len / wish.block_size) * load.block_bytes(wish.block_size)
        fixed = f", {gib(load.max_num_seqs * load.ring_bytes)} of rings" if rings else ""
        raise AskError(
            f"one request of {max_model_len:,} tokens needs {gib(needed)} of KV cache beside {gib(weights)} of weights"
            f"{fixed} and {beside} on each device, and {name} has {gib(budget)} to use",
            field="max_model_len",
            hint=remedies(load, wish, max_model_len),
        )
    made = MemoryMap(
        total_bytes=load.hardware.memory_bytes,
        budget_bytes=budget,
        weight_bytes=weights,
        workspace_bytes=workspace(max_model_len),
        graph_bytes=graph_bytes(load, wish, max_model_len),
        kv_bytes=blocks * load.block_bytes(wish.block_size) + rings * load.ring_bytes,
        kv_bytes_per_token=load.kv_bytes_per_token,
        ring_bytes=load.ring_bytes,
        num_rings=rings,
        num_tokens=blocks * wish.block_size,
        concurrency=blocks / math.ceil(max_model_len / wish.block_size),
    )
    return made, blocks


def _check_block_size(load: Load, block_size: int) -> None:
    if block_size % (multiple := block_multiple(load.specs)):
        ratios = sorted({spec.ratio for spec in load.specs} - {1})
        why = f"is {block_size}, and an entry of the cache stands for {', '.join(map(str, ratios))} tokens"
        raise AskError(why, field="block_size", hint=f"a multiple of {multiple}")


def remedies(load: Load, wish: Wish, max_model_len: int) -> str:
    """What would fit, with numbers: a shorter context, more devices, FP8 weights, another GPU."""
    free = dataclasses.replace(wish, kv_bytes=None, num_blocks=None)
    found = []
    if shorter := longest(max_model_len, lambda length: fits(load, free, length)):
        found.append(f"max_model_len {shorter}" if shorter < max_model_len else "no size of the cache given")
    for tokens in (2048, 512, 128):
        fewer = dataclasses.replace(load, max_num_batched_tokens=tokens)
        if tokens < load.max_num_batched_tokens and fits(fewer, free, max_model_len):
            found.append(f"max_num_batched_tokens {tokens}")
            break
    fewer = dataclasses.replace(load, max_num_seqs=max(1, load.max_num_seqs // 8))
    if load.ring_bytes and fewer.max_num_seqs < load.max_num_seqs and fits(fewer, free, max_model_len):
        found.append(f"max_num_seqs {fewer.max_num_seqs}")
    eager = dataclasses.replace(load, graphs=GraphSizes())
    if graph_bytes(load, wish, max_model_len) and fits(eager, free, max_model_len):
        found.append("cudagraph_mode NONE")
    sharded = (dataclasses.replace(load, tensor_parallel_size=size) for size in (2, 4, 8, 16))
    if load.hardware.kind != "cpu":
        for other in sharded:
            if other.tensor_parallel_size > load.tensor_parallel_size and fits(other, free, max_model_len):
                found.append(f"tensor_parallel_size {other.tensor_parallel_size}")
                break
    smaller = dataclasses.replace(load, keep_fp8=True)
    if load.architecture.quantization and not load.keep_fp8 and fits(smaller, free, max_model_len):
        found.append("--on fp8_linear")
    for name, count in ((name, count) for count in (1, 2, 4, 8) for name in TABLE):
        other = dataclasses.replace(load, hardware=TABLE[name], tensor_parallel_size=count)
        if TABLE[name].name != load.hardware.name and fits(other, free, max_model_len):
            found.append(f"--hardware {name}:{count}")
            break
    return "would fit: " + ", or ".join(found) if found else "nothing short of another model or more devices would fit"


def gib(num_bytes: int) -> str:
    """Bytes for people: 1.5 GiB, 320 MiB."""
    for unit, size in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{1 if num_bytes < 100 * size else 0}f} {unit}"
    return f"{num_bytes} B"
