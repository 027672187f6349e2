"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, integers, nbytes, normal, op


def _case(num_tokens: int, num_heads: int, dim: int, interleaved: bool, row: int = 0, bench: bool = False) -> Case:
    """`row` > dim: x is a view of the last channels of each head's longer row."""

    def make(
        generator: torch.Generator, dtype: torch.dtype, device: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        x = normal(generator, (num_tokens, num_heads, max(row, dim)), dtype, device)[..., -dim:]
        angle = torch.rand(4096 if bench else 50, dim // 2, generator=generator) * 6.28
        table = torch.cat((angle.cos(), angle.sin()), -1).to(device)
        return x, integers(generator, len(table), (num_tokens,), device), table, interleaved

    layout = "interleaved" if interleaved else "halves"
    return Case(f"T{num_tokens}-N{num_heads}-D{dim}-{layout}" + f"-of-{row}" * (row > 0), make, bench)


def _cost(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> Cost:
    return Cost(2 * nbytes(x) + len(positions) * (8 + 4 * cos_sin.shape[1]), 3 * x.numel())


@op(
    cases=(
        _case(1, 1, 64, True),
        _case(5, 3, 64, True, row=192),
        _case(4, 2, 128, False),
        _case(3, 5, 24, False),
        _case(1100, 1, 8, False),
        _case(4096, 128, 64, True, row=192, bench=True),
    ),
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (1e-3, 1e-6), torch.bfloat16: (8e-3, 1e-6)},
    cost=_cost,
)
def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, N, D] (last dimension contiguous), positions [T] int64, cos_sin [max_pos, D] fp32 -> like x, contiguous.

    Row p of cos_sin holds D/2 cosines and then D/2 sines of position p. Channel pairs (2i, 2i+1) where `interleaved`
    (MLA), else (i, i + D/2), rotate by their angle; in fp32, rounded once. All D channels are rotated.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
    wide = x.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = wide.chunk(2, -1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated.to(x.dtype)
