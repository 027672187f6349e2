"""K and V rows into the paged cache."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.op import Case, Cost, normal, op


def _case(rows: int, heads: int, dim: int, block_size: int, bench: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        num_blocks = 3 + rows // block_size
        k, v = (normal(generator, (rows, heads, dim), dtype, device) for _ in range(2))
        cache = normal(generator, (num_blocks, 2, block_size, heads, dim), dtype, device)
        slots = torch.randperm(num_blocks * block_size, generator=generator)[:rows].to(device)
        return k, v, cache, slots

    return Case(f"{rows}x{heads}x{dim}", make, bench)


def _cost(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> Cost:
    return Cost(4 * k.numel() * k.element_size() + 8 * slot_mapping.numel(), 0)


@op(
    cases=(
        _case(1, 2, 16, 4),
        _case(37, 3, 64, 16),
        _case(4096, 8, 128, 16, bench=True),
        _case(32768, 8, 128, 16, bench=True),
    ),
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (0.0, 0.0)),
    cost=_cost,
    writes=("cache",),
)
def write_kv(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """k, v [T, Nkv, D] into cache [num_blocks, 2, block_size, Nkv, D] at slot_mapping [T] int64 -> the same cache.

    A block is contiguous: block_size rows of K, then block_size rows of V, a row being one token's Nkv * D values, head
    after head. Slot s is row s % block_size of block s // block_size. Slots are distinct; k and v may be strided views.
    """
    size = cache.shape[2]
    block, offset = slot_mapping // size, slot_mapping % size
    cache[block, 0, offset] = k.to(cache.dtype)
    cache[block, 1, offset] = v.to(cache.dtype)
    return cache
