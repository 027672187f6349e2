"""add_rms_norm on a CPU: the sum, and rms_norm's kernel."""

from __future__ import annotations

import torch

from deepserve.ops.op import Kernel
from deepserve.ops.rms_norm.cpu import pack, rms_norm


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_rms_norm with a packed weight."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


KERNEL = Kernel("add_rms_norm", "cpu", add_rms_norm, {"weight": pack})
