"""Two results of attention over different keys merged into that over all of them (Dao et al. 2022, FlashAttention)."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, nbytes, op


def _case(num_tokens: int, num_heads: int, dim: int, bench: bool = False) -> Case:
    """Some sums are empty on one side, and some on both."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        if device == "meta":
            shapes = ((num_tokens, num_heads, dim), (num_tokens, num_heads)) * 2
            return tuple(torch.empty(shape, device=device) for shape in shapes)
        sides: list[torch.Tensor] = []
        for _ in range(2):
            empty = torch.rand(num_tokens, num_heads, generator=generator) < 0.2
            log_sum = (torch.randn(num_tokens, num_heads, generator=generator) * 6).masked_fill(empty, -torch.inf)
            mean = torch.randn(num_tokens, num_heads, dim, generator=generator).masked_fill(empty[..., None], 0)
            sides += [mean.to(device), log_sum.to(device)]
        return tuple(sides)

    return Case(f"{num_tokens}x{num_heads}x{dim}", make, bench)


def _cost(a: torch.Tensor, a_log_sum: torch.Tensor, b: torch.Tensor, b_log_sum: torch.Tensor) -> Cost:
    return Cost(3 * nbytes(a, a_log_sum), 3 * a.numel())


@op(
    cases=(_case(1, 2, 24), _case(37, 3, 64), _case(5, 4, 128), _case(8192, 16, 128, bench=True)),
    tolerance={torch.float32: (1e-6, 1e-6)},
    dtypes=(torch.float32,),
    cost=_cost,
)
def merge_attention(
    a: torch.Tensor, a_log_sum: torch.Tensor, b: torch.Tensor, b_log_sum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """a, b fp32 [T, N, D]: means of values, weighed by the softmax over two sets of keys; a_log_sum, b_log_sum fp32
    [T, N]: log2 of the sums of exponentials that they were divided by, -inf where a set is empty (its mean is 0 then).
    -> (the mean over both sets [T, N, D], its log_sum [T, N]).
    """
    log_sum = torch.logaddexp2(a_log_sum, b_log_sum)
    shift = log_sum.masked_fill(log_sum == -torch.inf, 0)
    return a * torch.exp2(a_log_sum - shift)[..., None] + b * torch.exp2(b_log_sum - shift)[..., None], log_sum
