"""Writes the compressed latents of MLA (DeepSeek-V2, section 2.1) to their cache slots."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, nbytes, normal, op


def _case(num_tokens: int, width: int, num_blocks: int, block_size: int, bench: bool = False) -> Case:
    return Case(
        f"T{num_tokens}-W{width}-{num_blocks}x{block_size}",
        lambda generator, dtype, device: (
            normal(generator, (num_tokens, width), dtype, device),
            normal(generator, (num_blocks, block_size, width), dtype, device),
            torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens].to(device),
        ),
        bench,
    )


def _cost(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> Cost:
    return Cost(nbytes(latent, slot_mapping) + latent.numel() * cache.element_size(), 0)


@op(
    writes=("cache",),
    cases=(
        _case(1, 576, 3, 16),
        _case(7, 100, 4, 8),
        _case(37, 576, 3, 16),
        _case(4096, 576, 512, 64, bench=True),
        _case(32768, 576, 1024, 64, bench=True),
    ),
    cost=_cost,
)
def write_latent(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """latent [T, R + P] (last dimension contiguous), cache [num_blocks, block_size, R + P] contiguous, slot_mapping [T]
    int64 (block * block_size + offset, all different) -> cache, with entry slot_mapping[t] set to latent[t], cast to
    the cache's dtype. A token's entry is R latent channels and then P rope channels, and nothing else.
    """
    cache.view(-1, cache.shape[-1])[slot_mapping] = latent.to(cache.dtype)
    return cache
