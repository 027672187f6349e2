"""rms_norm on a CPU in few passes: x / sqrt(mean x^2 + eps) * w = x / hypot(|x|, sqrt(H eps)) * (sqrt(H) w)."""

from __future__ import annotations

from functools import cache

import torch

from deepserve.ops.op import Kernel


@cache
def _floor(size: int, eps: float) -> torch.Tensor:
    return torch.tensor((size * eps) ** 0.5)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """sqrt(H) w in fp32."""
    return weight.float() * weight.shape[0] ** 0.5


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """rms_norm with a packed weight; rounded once."""
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    return torch.div(x, norm.hypot_(_floor(x.shape[-1], eps))).mul_(weight).to(x.dtype)


KERNEL = Kernel("rms_norm", "cpu", rms_norm, {"weight": pack})
