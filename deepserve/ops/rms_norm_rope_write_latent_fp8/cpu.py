"""rms_norm_rope_write_latent_fp8 on a CPU: the CPU kernels of its parts."""

from __future__ import annotations

import torch

from deepserve.ops.op import Kernel
from deepserve.ops.rms_norm.cpu import pack, rms_norm
from deepserve.ops.rope.cpu import rope
from deepserve.ops.write_latent_fp8.spec import write_latent_fp8


def rms_norm_rope_write_latent_fp8(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fp8: torch.dtype,
) -> torch.Tensor:
    """rms_norm_rope_write_latent_fp8 with a packed weight."""
    rotated = rope(k_rope, positions, cos_sin, interleaved).squeeze(1)
    return write_latent_fp8.reference(rms_norm(latent, weight, eps), rotated, cache, slot_mapping, fp8)


KERNEL = Kernel("rms_norm_rope_write_latent_fp8", "cpu", rms_norm_rope_write_latent_fp8, {"weight": pack})
