"""A cache of latents as Triton's kernels see it: where an entry's parts lie, in the elements of three views."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepserve.kv_cache.spec import latent_fp8


@dataclass(frozen=True, slots=True)
class Entries:
    """Of the entry of a slot: channels of the latent at latents[slot * latent_width], rope channels at
    ropes[slot * rope_width + rope_at], and where latents are FP8 their scale at scales[slot * scale_width + scale_at].
    """

    latents: torch.Tensor
    ropes: torch.Tensor
    scales: torch.Tensor | None
    block_size: int
    rank: int
    rope_dim: int
    latent_width: int
    rope_width: int
    rope_at: int
    scale_width: int = 0
    scale_at: int = 0

    @classmethod
    def plain(cls, cache: torch.Tensor, rank: int) -> Entries:
        """Of mla_attention's cache [num_blocks, block_size, R + P]."""
        _, block_size, width = cache.shape
        return cls(cache, cache, None, block_size, rank, width - rank, width, width, rank)

    @classmethod
    def in_fp8(cls, cache: torch.Tensor, rank: int, rope_dim: int, dtype: torch.dtype, fp8: torch.dtype) -> Entries:
        """Of mla_attention_fp8's cache [num_blocks, block_size, entry bytes], rope channels of `dtype`."""
        at, size = latent_fp8(rank, rope_dim * dtype.itemsize), dtype.itemsize
        return cls(
            cache.view(fp8), cache.view(dtype), cache.view(torch.float32), cache.shape[1], rank, rope_dim, at.size,
            at.size // size, at.rope // size, at.size // 4, at.scale // 4,
        )  # fmt: skip

    @property
    def entry_bytes(self) -> int:
        """Of what a kernel keeps of an entry on the chip while it waits for it."""
        return self.rank * self.latents.element_size() + self.rope_dim * self.ropes.element_size()

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents [n, R], rope channels [n, P]) of these slots, in the rope channels' dtype; rows are strided."""
        ropes = self.ropes.view(-1, self.rope_width).index_select(0, slots)
        rope = ropes[:, self.rope_at : self.rope_at + self.rope_dim]
        if self.scales is None:
            return ropes[:, : self.rank], rope
        # The same rows as bytes; a scale is a power of two, so that no product is rounded.
        latents = ropes.view(self.latents.dtype)[:, : self.rank].to(ropes.dtype)
        return latents.mul_(ropes.view(torch.float32)[:, self.scale_at, None].to(ropes.dtype)), rope
