"""How latent attention keeps what it caches: which ops write and read it. A layer has one of these, chosen once."""

from __future__ import annotations

import torch

from deepserve.ops.mla_attention.spec import mla_attention
from deepserve.ops.mla_attention_fp8.spec import mla_attention_fp8
from deepserve.ops.write_latent.spec import write_latent
from deepserve.ops.write_latent_fp8.spec import write_latent_fp8
from deepserve.runner.batch import Batch


class Latents:
    """In the dtype that is computed in."""

    def write(
        self, latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        """latent [T, R], k_rope [T, P] -> the cache, with their entries."""
        return write_latent(torch.cat((latent, k_rope), -1), cache, slot_mapping)

    def attend(
        self,
        q: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        batch: Batch,
        scale: float,
    ) -> torch.Tensor:
        """q: nope [T, N, nope] and rope [T, N, P] -> [T, N, v]."""
        return mla_attention(*q, cache, w_uk, w_uv, batch, scale)


class Fp8Latents(Latents):
    """In FP8 with a scale a token, rope channels as they are; `fp8` is float8_e4m3fn or float8_e4m3fnuz."""

    def __init__(self, fp8: torch.dtype):
        self.fp8 = fp8

    def write(
        self, latent: torch.Tensor, k_rope: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        return write_latent_fp8(latent, k_rope, cache, slot_mapping, self.fp8)

    def attend(
        self,
        q: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        batch: Batch,
        scale: float,
    ) -> torch.Tensor:
        return mla_attention_fp8(*q, cache, w_uk, w_uv, batch, scale, self.fp8)
