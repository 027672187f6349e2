"""Multi-head latent attention (DeepSeek-V2, section 2.1): one latent a token is cached, shared by all heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from deepserve.architecture import Mla
from deepserve.dtypes import TORCH_DTYPES
from deepserve.errors import AskError
from deepserve.layers.caches import Caches
from deepserve.layers.indexer import LightningIndexer
from deepserve.layers.latents import Fp8Latents, Latents
from deepserve.layers.linear import Maker
from deepserve.layers.norm import RmsNorm
from deepserve.layers.slot import Slot
from deepserve.ops.mla_sparse_attention.spec import mla_sparse_attention
from deepserve.ops.rope.spec import rope
from deepserve.runner.batch import Batch

LATENT_NORM_EPS = 1e-6  # of the two inner norms, whatever rms_norm_eps says (as the released code has it)


class MlaAttention(nn.Module):
    """x [T, H] -> [T, H]. Caches mla_latent [num_blocks, block_size, R + P] (in FP8 the bytes of
    kv_cache/spec.py:LatentFp8), and an indexer's index_keys beside it."""

    def __init__(self, make: Maker, hidden_size: int, mla: Mla, interleaved: bool):
        super().__init__()
        if mla.bias and mla.q_rank is None:
            raise AskError(
                "is not served together with q_lora_rank null",
                field="config.json: attention_bias",
                hint="set it to false",
            )
        self.mla, self.interleaved = mla, interleaved
        num_heads, width = mla.num_heads, mla.nope_dim + mla.rope_dim
        self.q_width = mla.q_rank or num_heads * width
        first = {"q_a_proj" if mla.q_rank else "q_proj": self.q_width}
        self.qkv_a = make.linear(hidden_size, first | {"kv_a_proj_with_mqa": mla.kv_rank + mla.rope_dim}, mla.bias)
        self.q_norm = RmsNorm(make, mla.q_rank, LATENT_NORM_EPS) if mla.q_rank else None
        self.q_b = make.linear(mla.q_rank, {"q_b_proj": num_heads * width}) if mla.q_rank else None
        self.kv_norm = RmsNorm(make, mla.kv_rank, LATENT_NORM_EPS)
        # Never kept in FP8: absorbed attention multiplies with it along its rows.
        self.kv_b = make.parameter(num_heads, mla.nope_dim + mla.v_dim, mla.kv_rank)
        self.o = make.linear(num_heads * mla.v_dim, {"o_proj": hidden_size}, mla.bias)
        self.indexer = None
        if mla.indexer is not None and mla.q_rank is not None:
            self.indexer = LightningIndexer(make, hidden_size, mla.q_rank, mla.rope_dim, mla.indexer)
        self.latents = Fp8Latents(TORCH_DTYPES[mla.fp8_latents]) if mla.fp8_latents else Latents()
        self.caches = Caches("mla_latent", *(("index_keys",) if self.indexer else ()))

    def forward(self, x: torch.Tensor, batch: Batch, cos_sin: torch.Tensor) -> torch.Tensor:
        mla = self.mla
        a = self.qkv_a(x)
        q = q_latent = a[:, : self.q_width]
        if self.q_norm is not None and self.q_b is not None:
            q_latent = self.q_norm(q_latent)
            q = self.q_b(q_latent)
        q = q.view(-1, mla.num_heads, mla.nope_dim + mla.rope_dim)
        q_rope = rope(q[..., mla.nope_dim :], batch.positions, cos_sin, self.interleaved)
        end = self.q_width + mla.kv_rank
        k_rope = rope(a[:, end:].unsqueeze(1), batch.positions, cos_sin, self.interleaved)
        latent = self.kv_norm(a[:, self.q_width : end])
        cache = self.latents.write(latent, k_rope.squeeze(1), self.caches.mla_latent, batch.slot_mapping)
        q_nope, w_uk, w_uv = q[..., : mla.nope_dim], self.kv_b[:, : mla.nope_dim], self.kv_b[:, mla.nope_dim :]
        if self.indexer is None:
            y = self.latents.attend((q_nope, q_rope), cache, w_uk, w_uv, batch, mla.scale)
        else:
            chosen = self.indexer(x, q_latent, batch, cos_sin, self.caches.index_keys)
            y = mla_sparse_attention(q_nope, q_rope, cache, w_uk, w_uv, chosen, batch, mla.scale)
        return self.o(y.flatten(1))

    def slots(self, prefix: str) -> Iterator[Slot]:
        """Where the tensors under `prefix` go."""
        yield from self.qkv_a.slots(prefix)
        if self.q_norm is not None and self.q_b is not None:
            yield from self.q_norm.slots(prefix + "q_a_layernorm")
            yield from self.q_b.slots(prefix)
        yield from self.kv_norm.slots(prefix + "kv_a_layernorm")
        yield Slot(prefix + "kv_b_proj.weight", self.kv_b.data.flatten(0, 1))
        yield from self.o.slots(prefix)
        if self.indexer is not None:
            yield from self.indexer.slots(prefix + "indexer.")
