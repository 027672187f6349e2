"""Drives a model with hand-made batches, and keeps what the scheduler and the block pool would: for tests of models.

Caches start as NaN, freed blocks become NaN again, and block tables are shuffled: what a model must not read, shows.
"""

from __future__ import annotations

import torch

from deepserve.architecture import Mla
from deepserve.graph.bind import bind
from deepserve.graph.trace import trace
from deepserve.models.decoder import Decoder
from deepserve.ops.inventory import inventory
from deepserve.ops.load import load_kernel
from deepserve.runner.batch import Batch

CPU_KERNELS = ("cpu", "onednn")


class Request:
    """Its known tokens, how many are computed, and its blocks."""

    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids
        self.num_computed = 0
        self.blocks: list[int] = []


class Driver:
    """`kernels`: eager calls the model itself; reference and cpu bind its graph to those, cpu where there is one."""

    def __init__(self, model: Decoder, kernels: str = "eager", block_size: int = 4, num_blocks: int = 200):
        self.block_size = block_size
        architecture = model.architecture
        attention, dtype = architecture.attention, model.embedding.weight.dtype
        if isinstance(attention, Mla):
            shape: tuple[int, ...] = (num_blocks, block_size, attention.kv_rank + attention.rope_dim)
        else:
            shape = (num_blocks, 2, block_size, attention.num_kv_heads, attention.head_dim)
        self.caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in model.attention_caches]
        for layer, cache in zip(model.attention_caches, self.caches):
            layer.cache = cache
        self.free = torch.randperm(num_blocks).tolist()
        self.forward, self.logits = model, model.logits
        if kernels != "eager":
            chosen = {op: load_kernel(op, _pick(op, kernels)) for op in inventory()}
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
        return out

    def batch(self, rows: list[tuple[Request, int]]) -> Batch:
        """Allocates blocks; makes the batch."""
        size = self.block_size
        for request, count in rows:
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
            sample_idx=start[1:] - 1,
            block_size=size,
            num_single=sum(length == 1 for length in query_lens),
            max_query_len=max(query_lens),
            max_seq_len=max(context_lens),
            query_lens=query_lens,
            context_lens=context_lens,
        )

    def preempt(self, request: Request, keep: int = 0) -> None:
        """Frees all blocks but the first `keep` and poisons them; the request starts again behind those it keeps."""
        for cache in self.caches:
            cache[request.blocks[keep:]] = torch.nan
        self.free[:0] = request.blocks[keep:]
        request.blocks = request.blocks[:keep]
        request.num_computed = keep * self.block_size


def _pick(op: str, kernels: str) -> str:
    names = [info.name for info in inventory()[op]]
    return next((name for name in CPU_KERNELS if kernels == "cpu" and name in names), "reference")
