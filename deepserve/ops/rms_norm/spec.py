"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, case, nbytes, normal, op

# One rounding of the normalised value and one of the product: up to two units in the last place of each dtype.
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}


def _slice() -> Case:
    """A view of the first channels of wider rows, as MLA's latent is normalised next to its rope channels."""
    return Case(
        "5x512-of-576",
        lambda generator, dtype, device: (
            normal(generator, (5, 576), dtype, device)[:, :512],
            normal(generator, (512,), dtype, device),
            1e-6,
        ),
    )


def _cost(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    return Cost(2 * nbytes(x) + nbytes(weight), 4 * x.numel())


@op(
    cases=(
        case((1, 64), (64,), 1e-6),
        case((7, 100), (100,), 1e-6),
        case((3, 7168), (7168,), 1e-6),
        case((4, 3, 128), (128,), 1e-6),
        _slice(),
        case((4096, 7168), (7168,), 1e-6, bench=True),
    ),
    tolerance=TOLERANCE,
    cost=_cost,
)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H] (last dimension contiguous), weight [H] of x's dtype -> like x, contiguous.

    Statistics in fp32; the normalised value is rounded to x's dtype, then multiplied by weight (transformers' order).
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
