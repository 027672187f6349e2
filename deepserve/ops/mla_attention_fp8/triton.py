"""mla_attention_fp8 in Triton: mla_attention's kernels, which fold an entry's scale into scores and probabilities."""

from __future__ import annotations

import torch

from deepserve.ops.mla_attention.entries import Entries
from deepserve.ops.mla_attention.triton import attend
from deepserve.ops.op import Kernel
from deepserve.runner.batch import Batch


def mla_attention_fp8(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    fp8: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See spec.py and `attend`."""
    entries = Entries.in_fp8(cache, w_uk.shape[2], q_rope.shape[2], q_rope.dtype, fp8)
    return attend(q_nope, q_rope, entries, w_uk, w_uv, batch, scale, out)


KERNEL = Kernel("mla_attention_fp8", "triton", mla_attention_fp8)
