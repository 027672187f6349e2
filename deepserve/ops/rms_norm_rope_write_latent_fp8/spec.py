"""What MLA stores of a token (DeepSeek-V2, section 2.1) in FP8, from the projection to the cache in one pass."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.op import Case, Cost, Told, nbytes, op
from deepserve.ops.quant_fp8.spec import FP8
from deepserve.ops.rms_norm.spec import TOLERANCE, rms_norm
from deepserve.ops.rms_norm_rope_write_latent.spec import make_case
from deepserve.ops.rope.spec import rope
from deepserve.ops.write_latent_fp8.spec import fp8_cache, read_latents, write_latent_fp8


def _case(num_tokens: int, rank: int, rope_dim: int, interleaved: bool, fp8: torch.dtype, bench: bool = False) -> Case:
    """The sibling's, with a cache of bytes."""
    plain = make_case(num_tokens, rank, rope_dim, interleaved)

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        *arguments, cache, slots = plain.make(generator, dtype, device)
        num_blocks, block_size, _ = cache.shape
        empty = fp8_cache(num_blocks, block_size, rank, rope_dim * dtype.itemsize, device)
        return *arguments, empty, slots, fp8

    return Case(f"{plain.name}-{fp8}".replace("torch.", ""), make, bench, fp8)


def _numbers(latent: torch.Tensor, weight: torch.Tensor, eps: float, k_rope: torch.Tensor, *rest: Any) -> Told:
    *_, cache, _, fp8 = rest
    latents, rotated = read_latents(cache.flatten(0, 1), latent.shape[1], k_rope.shape[2], k_rope.dtype, fp8)
    return (latents, fp8), (rotated, k_rope.dtype)


def _cost(latent: torch.Tensor, weight: torch.Tensor, eps: float, k_rope: torch.Tensor, *rest: Any) -> Cost:
    positions, cos_sin, _, _, slot_mapping, _ = rest
    angles = len(positions) * (8 + 4 * cos_sin.shape[1])
    written = len(latent) * (latent.shape[1] + 4) + nbytes(k_rope)
    read = nbytes(latent, weight, k_rope, slot_mapping) + angles
    return Cost(read + written, 7 * latent.numel() + 3 * k_rope.numel())


@op(
    fused=True,
    writes=("cache",),
    numbers=_numbers,
    cases=(
        _case(1, 64, 16, True, FP8[0]),
        _case(7, 96, 24, False, FP8[0]),
        _case(5, 512, 64, True, FP8[1]),
        _case(1030, 512, 16, True, FP8[0]),
        _case(4096, 512, 64, True, FP8[0], bench=True),
        _case(4096, 512, 64, True, FP8[1], bench=True),
        _case(32768, 512, 64, True, FP8[0], bench=True),
    ),
    # A norm that is rounded to the other side may move a value by an FP8 step: 2^-3 of it, or one subnormal step, which
    # twice the scale of the largest latents of these cases makes 2^-13.
    tolerance=TOLERANCE | dict.fromkeys(FP8, (0.13, 2**-12)),
    cost=_cost,
)
def rms_norm_rope_write_latent_fp8(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fp8: torch.dtype,
) -> torch.Tensor:
    """latent [T, R], weight [R], k_rope [T, 1, P], positions [T] int64, cos_sin [max_pos, P] fp32, cache uint8
    [num_blocks, block_size, entry bytes] -> cache, with entry slot_mapping[t] set to the normalised latent in FP8 and
    the rotated k_rope; see rms_norm, rope and write_latent_fp8 (which has the layout).
    """
    rotated = rope(k_rope, positions, cos_sin, interleaved)
    return write_latent_fp8(rms_norm(latent, weight, eps), rotated.squeeze(1), cache, slot_mapping, fp8)
