"""Grouped-query attention that is the same bits whatever the batch: each token is a row, in parts of its own length."""

from __future__ import annotations

from dataclasses import replace

import torch

from deepserve.ops.gqa_attention.triton import decode
from deepserve.ops.op import Kernel
from deepserve.ops.paged import single_rows
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
    rows, at_once = single_rows(batch), fixed_rows(*q.shape[1:])
    for start in range(0, len(q), at_once):
        some = slice(start, start + at_once)
        part = replace(rows, block_table=rows.block_table[some], seq_lens=rows.seq_lens[some])
        decode(q[some], cache, part, scale, window, out[some], FIXED_SPLITS)
    return out


KERNEL = Kernel("gqa_attention", "invariant", gqa_attention)
