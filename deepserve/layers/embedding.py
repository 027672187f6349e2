"""The two ends of a model: token ids to rows, rows to logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from deepserve.layers.linear import Maker
from deepserve.layers.slot import Slot
from deepserve.ops.embedding.spec import embedding
from deepserve.ops.head_matmul.spec import head_matmul


class Embedding(nn.Module):
    """token_ids [T] -> [T, H]."""

    def __init__(self, make: Maker, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = make.parameter(vocab_size, hidden_size)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return embedding(token_ids, self.weight)

    def slots(self, name: str) -> Iterator[Slot]:
        """Where the tensor `name`.weight goes."""
        yield Slot(name + ".weight", self.weight.data)


class Head(Embedding):
    """hidden [S, H] -> logits fp32 [S, V]. With `tied` it has no weight of its own."""

    def __init__(self, make: Maker, vocab_size: int, hidden_size: int, tied: Embedding | None):
        if tied is None:
            super().__init__(make, vocab_size, hidden_size)
        else:
            nn.Module.__init__(self)
            self.weight = tied.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_matmul(hidden, self.weight)
