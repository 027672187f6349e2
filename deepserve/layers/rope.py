"""Angles of rotary position embedding: plain, linear, YaRN (Peng et al. 2023) and Llama 3's."""

from __future__ import annotations

import math

import torch

from deepserve.architecture import Rope


def rope_table(rope: Rope, num_positions: int, device: str | torch.device) -> torch.Tensor:
    """fp32 [num_positions, dim]: D/2 cosines, then D/2 sines of every position, scaled as YaRN wants."""
    if torch.device(device).type == "meta":
        return torch.empty(num_positions, rope.dim, device="meta")
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies(rope)
    return (torch.cat((angles.cos(), angles.sin()), -1) * rope.cos_sin_scale).to(device)


def frequencies(rope: Rope) -> torch.Tensor:
    """fp32 [dim / 2]: radians a position."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    return plain


def _yarn(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Slow channels are interpolated, fast ones kept, those between blended."""

    def channel(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return rope.dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

    low = max(math.floor(channel(rope.beta_fast)), 0)
    high = min(math.ceil(channel(rope.beta_slow)), rope.dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Wavelengths longer than the trained context are stretched, short ones kept, those between blended."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return plain / rope.factor * (1 - blend) + plain * blend
