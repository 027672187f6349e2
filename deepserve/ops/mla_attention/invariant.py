"""Latent attention that is the same bits whatever the batch: each token is a row, absorbed, in parts of its own length.

A prompt costs more than as one row, because each of its tokens reads the context for itself.
"""

from __future__ import annotations

import torch

from deepserve.ops.mla_attention.entries import Entries
from deepserve.ops.mla_attention.triton import head_product, mix_in_parts
from deepserve.ops.op import Kernel
from deepserve.ops.split_context import fixed_rows
from deepserve.runner.batch import Batch

TOKENS = 32  # of a program of a head's product


def mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See spec.py. The latent has at most LARGEST_RANK channels."""
    heads, v_dim, rank = w_uv.shape
    if out is None:
        out = torch.empty((len(q_nope), heads, v_dim), dtype=q_nope.dtype, device=q_nope.device)
    entries = Entries.plain(cache, rank)
    for some, rows in fixed_rows(batch, heads, rank):
        q_latent = torch.empty((heads, len(rows.seq_lens), rank), dtype=q_nope.dtype, device=q_nope.device)
        head_product(q_nope[some], w_uk, q_latent.transpose(0, 1), TOKENS)
        mixed = mix_in_parts(q_latent, q_rope[some], entries, rows, scale)
        head_product(mixed.transpose(0, 1), w_uv.transpose(1, 2), out[some], TOKENS)
    return out


KERNEL = Kernel("mla_attention", "invariant", mla_attention)
