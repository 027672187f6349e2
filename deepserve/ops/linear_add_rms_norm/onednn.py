"""One oneDNN product that adds the residual to its sums before it rounds them, and rms_norm's CPU kernel."""

from __future__ import annotations

import torch

from deepserve.ops.linear import onednn
from deepserve.ops.op import Kernel
from deepserve.ops.rms_norm import cpu


def function(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear_add_rms_norm with both weights packed."""
    residual = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, None, "add")
    return cpu.rms_norm(residual, norm_weight, eps), residual


KERNEL = Kernel("linear_add_rms_norm", "onednn", function, {"weight": onednn.pack, "norm_weight": cpu.pack})
