"""Root-mean-square normalisation with a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from deepserve.layers.linear import Maker
from deepserve.layers.slot import Slot
from deepserve.ops.rms_norm.spec import rms_norm


class RmsNorm(nn.Module):
    """x [..., width] divided by its root mean square, times the weight."""

    def __init__(self, make: Maker, width: int, eps: float):
        super().__init__()
        self.weight = make.parameter(width)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def slots(self, name: str) -> Iterator[Slot]:
        """Where the tensor `name`.weight goes."""
        yield Slot(name + ".weight", self.weight.data)
