"""From the projections of a layer to its latent attention (DeepSeek-V2, section 2.1), new cache entries included."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from deepserve.ops.mla_attention.spec import Shape, mla_attention
from deepserve.ops.mla_attention.spec import _case as attention_case
from deepserve.ops.op import Case, Cost, nbytes, op
from deepserve.ops.rms_norm_rope_write_latent.spec import rms_norm_rope_write_latent
from deepserve.ops.rope.spec import rope
from deepserve.runner.batch import Batch


def _case(name: str, queries: list[int], contexts: list[int], shape: Shape, interleaved: bool = True) -> Case:
    """A case of mla_attention, whose newest tokens are not in the cache yet: there the cache holds NaN."""
    attention = attention_case(name, queries, contexts, shape)

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        q_nope, q_rope, cache, w_uk, w_uv, batch, scale = attention.make(generator, dtype, device)
        rank, rope_dim = w_uk.shape[2], q_rope.shape[2]
        a = torch.randn(len(q_nope), 32 + rank + rope_dim, generator=generator).to(device, dtype)
        angle = torch.rand(max(contexts), rope_dim // 2, generator=generator) * 6.28
        cache.view(-1, rank + rope_dim)[batch.slot_mapping] = torch.nan
        gain = (1 + 0.1 * torch.randn(rank, generator=generator)).to(device, dtype)
        return (
            q_nope, q_rope, a[:, 32 : 32 + rank], gain, 1e-6, a[:, 32 + rank :].unsqueeze(1), batch.positions,
            torch.cat((angle.cos(), angle.sin()), -1).to(device), interleaved, cache, batch.slot_mapping, w_uk, w_uv,
            batch, scale,
        )  # fmt: skip

    return dataclasses.replace(attention, make=make)


def _cost(q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, *rest: Any) -> Cost:
    cache, _, w_uk, w_uv, batch, scale = rest[-6:]
    attention = mla_attention.cost(q_nope, q_rope, cache, w_uk, w_uv, batch, scale) if mla_attention.cost else None
    assert attention is not None
    written = len(latent) * cache.shape[-1] * cache.element_size()
    return Cost(attention.num_bytes + nbytes(latent) + written, attention.flops + 4 * latent.numel())


@op(
    fused=True,
    writes=("cache",),
    cases=(
        _case("single", [1, 1, 1], [1, 17, 40], (4, 16, 8, 32, 24, 4)),
        _case("halves", [1] * 20, [i * 7 % 120 + 1 for i in range(20)], (3, 20, 12, 36, 24, 16), interleaved=False),
        _case("mixed", [1, 1, 5, 20], [3, 64, 9, 20], (2, 32, 16, 64, 16, 8)),
        _case("decode_1_1024", [1], [4352], (16, 128, 64, 512, 128, 64)),
        _case("decode_16_1024", [1] * 16, [1024] * 16, (16, 128, 64, 512, 128, 64)),
    ),
    tolerance={torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)},
    cost=_cost,
)
def rope_write_mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """q_nope [T, N, nope], q_rope [T, N, P] (not rotated yet), then rms_norm_rope_write_latent's arguments from latent
    to slot_mapping, then mla_attention's from w_uk on -> [T, N, v]; the cache has the tokens' entries afterwards.
    """
    rotated = rope(q_rope, positions, cos_sin, interleaved)
    cache = rms_norm_rope_write_latent(
        latent, norm_weight, eps, k_rope, positions, cos_sin, interleaved, cache, slot_mapping
    )
    return mla_attention(q_nope, rotated, cache, w_uk, w_uv, batch, scale)
