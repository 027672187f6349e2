"""Drives a model with hand-made batches, and keeps what the scheduler and the block pool would: for tests of models.

Caches start as NaN, freed blocks become NaN again, and block tables are shuffled: what a model must not read, shows.
"""

from __future__ import annotations

import math

import torch

from deepserve.dtypes import TORCH_DTYPES
from deepserve.graph.bind import bind
from deepserve.graph.trace import trace
from deepserve.hardware import this_machine
from deepserve.kv_cache.spec import block_multiple, cache_specs
from deepserve.kv_cache.tensors import allocate
from deepserve.layers.caches import place
from deepserve.models.decoder import Decoder
from deepserve.ops.inventory import inventory, refusals
from deepserve.ops.load import load_kernel
from deepserve.runner.batch import Batch

CHOSEN = {"reference": (), "cpu": ("cpu", "onednn"), "native": ("native", "cpu", "onednn")}
NUM_RINGS = 32
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Request:
    """Its known tokens, how many are computed, and its blocks."""

    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids
        self.num_computed = 0
        self.blocks: list[int] = []
        self.ring = -1
        self.snapshots: dict[int, list[torch.Tensor]] = {}  # by leading blocks: its rings when those were computed


class Driver:
    """`kernels`: eager calls the model itself; others bind its graph to the first of CHOSEN that an op has
    here."""

    def __init__(
        self, model: Decoder, kernels: str = "eager", block_size: int = 4, num_blocks: int = 200, num_drafts: int = 0
    ):
        dtype = DTYPE_NAMES[model.embedding.weight.dtype]
        specs = cache_specs(model.architecture, dtype, num_drafts, model.mtp is not None)
        self.block_size = block_size = math.lcm(block_size, block_multiple(specs))
        tensors = allocate(specs, num_blocks, block_size, "cpu", NUM_RINGS)
        for tensor in tensors:
            tensor.fill_(_nan(tensor))
        place(specs, tensors, model.attention_caches)
        self.caches = [tensor for spec, tensor in zip(specs, tensors) if not spec.ring]
        self.rings = [tensor for spec, tensor in zip(specs, tensors) if spec.ring]
        self.free = torch.randperm(num_blocks).tolist()
        self.free_rings = torch.randperm(NUM_RINGS).tolist()
        self.forward, self.logits = model, model.logits
        if kernels != "eager":
            chosen = {op: load_kernel(op, _pick(op, kernels, dtype)) for op in inventory()}
            self.forward, self.logits = (bind(trace(model, method), chosen) for method in ("forward", "logits"))

    def step(self, scheduled: list[tuple[Request, int]]) -> list[torch.Tensor]:
        """Computes the next n tokens of each request; returns the logits [n, V] of each, in the order given."""
        order = sorted(range(len(scheduled)), key=lambda i: scheduled[i][1] > 1)
        hidden = self.forward(self.batch([scheduled[i] for i in order]))
        assert not hidden.isnan().any()
        out: list[torch.Tensor] = [hidden] * len(scheduled)
        start = 0
        for i in order:
            request, count = scheduled[i]
            out[i] = self.logits(hidden[start : start + count])
            start += count
            request.num_computed += count
            if self.rings and request.num_computed % self.block_size == 0:
                snapshot = [ring[request.ring].clone() for ring in self.rings]
                request.snapshots[request.num_computed // self.block_size] = snapshot
        return out

    def batch(self, rows: list[tuple[Request, int]]) -> Batch:
        """Allocates blocks; makes the batch."""
        size = self.block_size
        for request, count in rows:
            if request.ring < 0:
                request.ring = self.free_rings.pop()
            while len(request.blocks) * size < request.num_computed + count:
                request.blocks.append(self.free.pop())
        spans = [range(request.num_computed, request.num_computed + count) for request, count in rows]
        table = torch.full((len(rows), max(len(request.blocks) for request, _ in rows) + 1), self.free[-1]).int()
        for row, (request, _) in zip(table, rows):
            row[: len(request.blocks)] = torch.tensor(request.blocks)
        query_lens, context_lens = [len(span) for span in spans], [span.stop for span in spans]
        start = torch.tensor([0, *query_lens]).cumsum(0)
        return Batch(
            token_ids=torch.tensor([r.token_ids[p] for (r, _), span in zip(rows, spans) for p in span]),
            positions=torch.tensor([p for span in spans for p in span]),
            slot_mapping=torch.tensor(
                [r.blocks[p // size] * size + p % size for (r, _), span in zip(rows, spans) for p in span]
            ),
            block_table=table,
            query_start=start.int(),
            seq_lens=torch.tensor(context_lens).int(),
            ring_ids=torch.tensor([request.ring for request, _ in rows]),
            sample_idx=start[1:] - 1,
            block_size=size,
            num_single=sum(length == 1 for length in query_lens),
            max_query_len=max(query_lens),
            max_seq_len=max(context_lens),
            query_lens=query_lens,
            context_lens=context_lens,
        )

    def share(self, request: Request, other: Request, num_tokens: int) -> None:
        """Lets a new request begin behind another's first tokens, a multiple of a block, where a step of it ended."""
        num_blocks = num_tokens // self.block_size
        request.blocks, request.num_computed = other.blocks[:num_blocks], num_tokens
        request.ring = self.free_rings.pop()
        for ring, snapshot in zip(self.rings, other.snapshots[num_blocks] if self.rings else ()):
            ring[request.ring] = snapshot

    def preempt(self, request: Request, keep: int = 0) -> None:
        """Frees all blocks but the first `keep` and poisons them; the request starts again behind those it keeps.

        With rings it keeps no more than it has a snapshot for; it enters another ring with that snapshot.
        """
        self.free_rings.insert(0, request.ring)
        for ring in self.rings:
            ring[request.ring] = torch.nan
        request.ring = self.free_rings.pop()
        if self.rings:
            keep = max((count for count in request.snapshots if count <= keep), default=0)
        for ring, snapshot in zip(self.rings, request.snapshots.get(keep, [])):
            ring[request.ring] = snapshot
        for cache in self.caches:
            cache[request.blocks[keep:]] = _nan(cache)
        self.free[:0] = request.blocks[keep:]
        request.blocks = request.blocks[:keep]
        request.num_computed = keep * self.block_size


def _nan(cache: torch.Tensor) -> float:
    return 0xFF if cache.dtype == torch.uint8 else torch.nan  # bytes: NaN as e4m3 and as fp32


def _pick(op: str, kernels: str, dtype: str) -> str:
    possible = [name for name, why_not in refusals(op, this_machine(), dtype).items() if why_not is None]
    return next((name for name in CHOSEN[kernels] if name in possible), "reference")
