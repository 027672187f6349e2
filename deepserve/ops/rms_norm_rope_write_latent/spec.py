"""What MLA stores of a token (DeepSeek-V2, section 2.1), from the projection to the cache in one pass."""

from __future__ import annotations

from typing import Any

import torch

from deepserve.ops.op import Case, Cost, integers, nbytes, normal, op
from deepserve.ops.rms_norm.spec import TOLERANCE, rms_norm
from deepserve.ops.rope.spec import rope
from deepserve.ops.write_latent.spec import write_latent


def make_case(num_tokens: int, rank: int, rope_dim: int, interleaved: bool, bench: bool = False) -> Case:
    """Both inputs are views of one projection's rows, behind q_a's 32 channels."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[torch.Tensor | float | bool, ...]:
        a = normal(generator, (num_tokens, 32 + rank + rope_dim), dtype, device)
        angle = torch.rand(50, rope_dim // 2, generator=generator) * 6.28
        num_blocks = 2 + num_tokens // 16
        return (
            a[:, 32 : 32 + rank],
            normal(generator, (rank,), dtype, device),
            1e-6,
            a[:, 32 + rank :].unsqueeze(1),
            integers(generator, 50, (num_tokens,), device),
            torch.cat((angle.cos(), angle.sin()), -1).to(device),
            interleaved,
            normal(generator, (num_blocks, 16, rank + rope_dim), dtype, device),
            torch.randperm(num_blocks * 16, generator=generator)[:num_tokens].to(device),
        )

    layout = "interleaved" if interleaved else "halves"
    return Case(f"T{num_tokens}-R{rank}-P{rope_dim}-{layout}", make, bench)


def _cost(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    *rest: Any,
) -> Cost:
    _, cache, slot_mapping = rest
    angles = len(positions) * (8 + 4 * cos_sin.shape[1])
    written = (latent.numel() + k_rope.numel()) * cache.element_size()
    read = nbytes(latent, weight, k_rope, slot_mapping) + angles
    return Cost(read + written, 4 * latent.numel() + 3 * k_rope.numel())


@op(
    fused=True,
    writes=("cache",),
    cases=(
        make_case(1, 64, 16, True),
        make_case(7, 100, 24, False),
        make_case(5, 512, 64, True),
        make_case(1030, 512, 16, True),
        make_case(4096, 512, 64, True, bench=True),
        make_case(32768, 512, 64, True, bench=True),
    ),
    tolerance=TOLERANCE,
    cost=_cost,
)
def rms_norm_rope_write_latent(
    latent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """latent [T, R], weight [R], k_rope [T, 1, P], positions [T] int64, cos_sin [max_pos, P] fp32 -> cache, with entry
    slot_mapping[t] set to the normalised latent and the rotated k_rope; see rms_norm, rope and write_latent.
    """
    rotated = rope(k_rope, positions, cos_sin, interleaved)
    entry = torch.cat((rms_norm(latent, weight, eps), rotated.squeeze(1)), -1)
    return write_latent(entry, cache, slot_mapping)
