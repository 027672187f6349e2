"""oneDNN with a packed weight. Needs a CPU; logits are rounded to the model's dtype before they become fp32."""

from __future__ import annotations

import torch

from deepserve.ops.linear import onednn
from deepserve.ops.op import Kernel


def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """head_matmul with a packed weight."""
    return onednn.function(hidden, weight, None).float()


KERNEL = Kernel("head_matmul", "onednn", function, {"weight": onednn.pack})
