"""The memory behind the blocks: one tensor a layer, made once and written in place by the attention layers."""

from __future__ import annotations

import mmap
from math import prod

import torch

from deepserve.dtypes import TORCH_DTYPES
from deepserve.errors import AskError
from deepserve.kv_cache.spec import CacheSpec


def cache_shape(spec: CacheSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
    """mla_latent: [num_blocks, block_size, R + P]. kv_heads: [num_blocks, 2, block_size, Nkv, D], K before V.

    A block is contiguous. These are the layouts of ops/write_latent and ops/write_kv.
    """
    if spec.kind == "mla_latent":
        return (num_blocks, block_size, *spec.row)
    return (num_blocks, spec.row[0], block_size, *spec.row[1:])


def allocate(
    specs: list[CacheSpec], num_blocks: int, block_size: int, device: torch.device | str
) -> list[torch.Tensor]:
    """The caches of all layers in the order of `specs`, zeroed: a masked entry times 0 must not be NaN.

    AskError, with the bytes that were asked for, where the memory is not there.
    """
    caches = []
    for spec in specs:
        try:
            shape = cache_shape(spec, num_blocks, block_size)
            caches.append(_zeros(shape, TORCH_DTYPES[spec.dtype], torch.device(device)))
        except (RuntimeError, OSError) as error:  # torch.OutOfMemoryError is one too
            if "memory" not in str(error):
                raise
            num_bytes = sum(one.bytes_per_token for one in specs) * num_blocks * block_size
            raise AskError(
                f"{num_blocks} blocks of {block_size} tokens take {num_bytes:,} bytes, which {device} does not have",
                field="kv_cache_memory_bytes",
                hint="fewer: --kv-cache-memory-bytes or --num-gpu-blocks-override",
            ) from error
    return caches


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU fresh pages of the kernel, which are zero and take neither time nor memory until written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = prod(shape)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).view(shape)
