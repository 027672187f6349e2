"""Grouped-query attention that is the same bits whatever the batch: each token is a row, in parts of its own length."""

from __future__ import annotations

import torch

from deepserve.ops.gqa_attention.triton import decode
from deepserve.ops.op import Kernel
from deepserve.ops.split_context import FIXED_SPLITS, fixed_rows
from deepserve.runner.batch import Batch


def gqa_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See spec.py."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    for some, rows in fixed_rows(batch, *q.shape[1:]):
        decode(q[some], cache, rows, scale, window, out[some], FIXED_SPLITS)
    return out


KERNEL = Kernel("gqa_attention", "invariant", gqa_attention)
