"""Latent attention over a cache in FP8 on a CPU: mla_attention's, on entries that are dequantised as they are gathered.

Needs a CPU. Values are looked up in a table: torch converts e4m3 six times slower than that.
"""

from __future__ import annotations

from functools import cache as remember

import torch

from deepserve.ops.mla_attention.cpu import attend
from deepserve.ops.op import Kernel
from deepserve.ops.write_latent_fp8.spec import latent_parts
from deepserve.runner.batch import Batch


@remember
def _table(fp8: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """What each byte is."""
    return torch.arange(256, dtype=torch.uint8).view(fp8).to(dtype)


def function(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    fp8: torch.dtype,
) -> torch.Tensor:
    """mla_attention_fp8."""
    rows, rank, rope_dim, table = cache.flatten(0, 1), w_uk.shape[2], q_rope.shape[2], _table(fp8, q_rope.dtype)

    def gather(slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        values, k_rope, scales = latent_parts(rows.index_select(0, slots), rank, rope_dim, out.dtype)
        latents = table.index_select(0, values.flatten().int()).view(values.shape)
        torch.mul(latents, scales.to(out.dtype).unsqueeze(1), out=out[:, :rank])  # exact: a power of two
        out[:, rank:] = k_rope
        return out

    return attend(q_nope, q_rope, gather, w_uk, w_uv, batch, scale)


KERNEL = Kernel("mla_attention_fp8", "cpu", function, dict.fromkeys(("w_uk", "w_uv"), torch.Tensor.contiguous))
