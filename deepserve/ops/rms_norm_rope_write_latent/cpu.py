"""rms_norm_rope_write_latent on a CPU: the CPU kernels of its parts."""

from __future__ import annotations

import torch

from deepserve.ops.op import Kernel
from deepserve.ops.rms_norm.cpu import pack, rms_norm
from deepserve.ops.rope.cpu import rope


def rms_norm_rope_write_latent(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """rms_norm_rope_write_latent with a packed weight."""
    rotated = rope(k_rope, positions, cos_sin, interleaved).squeeze(1)
    entry = torch.cat((rms_norm(latent, weight, eps), rotated), -1)
    cache.view(-1, cache.shape[-1]).index_copy_(0, slot_mapping, entry.to(cache.dtype))
    return cache


KERNEL = Kernel("rms_norm_rope_write_latent", "cpu", rms_norm_rope_write_latent, {"weight": pack})
