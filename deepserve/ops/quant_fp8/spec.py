"""Dynamic FP8 quantisation of activations (DeepSeek-V3, section 3.3), one scale a token and group of channels."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from deepserve.ops.op import Cost, case, nbytes, op

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
FLOOR = 1e-4  # the least amax, as in DeepSeek's kernels: a group of zeros has a scale too

# A value that lands on the other side of a rounding boundary is one FP8 step away (2^-3 of it, or one subnormal step).
# Scales, and what is returned beside them, may differ by what one unit in the last place of the input makes of them.
TOLERANCE = {
    FP8[0]: (0.13, 2**-9),
    FP8[1]: (0.13, 2**-10),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}


def _cost(x: torch.Tensor, group: int, power_of_two: bool, dtype: torch.dtype) -> Cost:
    return Cost(nbytes(x) + x.numel() + 4 * x.numel() // group, 3 * x.numel())


@op(
    cases=(
        case((1, 128), 128, False, FP8[0]),
        case((3, 200), 128, False, FP8[0]),
        case((5, 1024), 128, True, FP8[0]),
        case((2, 512), 128, False, FP8[1]),
        case((2, 512), 128, True, FP8[1]),
        case((4096, 7168), 128, False, FP8[0], bench=True),
    ),
    cost=_cost,
)
def quant_fp8(x: torch.Tensor, group: int, power_of_two: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] -> (x8 [T, H] of `dtype`, scales [T, ceil(H / group)] fp32), with x ≈ x8 * scale of its group.

    scale = max(amax, 1e-4) / largest value of `dtype` (448 for float8_e4m3fn, 240 for float8_e4m3fnuz: gfx942), rounded
    up to a power of two where `power_of_two` (ue8m0); x8 = x / scale, clamped, rounded to nearest even.
    """
    num_tokens, hidden = x.shape
    largest = torch.finfo(dtype).max
    grouped = F.pad(x.float(), (0, -hidden % group)).view(num_tokens, -1, group)
    # A tensor, not a number: dividing by a number, CUDA multiplies with its rounded reciprocal.
    scales = grouped.abs().amax(-1).clamp_min(FLOOR) / grouped.new_full((), largest)
    if power_of_two:
        bits = scales.view(torch.int32)  # the exponent, plus one where the mantissa is not 0
        scales = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    x8 = (grouped / scales.unsqueeze(-1)).clamp(-largest, largest).to(dtype)
    return x8.view(num_tokens, -1)[:, :hidden], scales
