"""Probabilities of each row at its temperature."""

from __future__ import annotations

import torch

from deepserve.ops.op import Case, Cost, nbytes, normal, op


def _case(num_rows: int, vocab_size: int, masked: bool = False, bench: bool = False) -> Case:
    """`masked`: most of a row is -inf, as after top-k."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        logits = 3 * normal(generator, (num_rows, vocab_size), dtype, device)
        if masked:
            logits[:, vocab_size // 100 :] = -torch.inf
        return logits, torch.rand(num_rows, generator=generator).add(0.1).to(device)

    return Case(f"S{num_rows}-V{vocab_size}" + "-masked" * masked, make, bench)


def _cost(logits: torch.Tensor, temperature: torch.Tensor) -> Cost:
    return Cost(2 * nbytes(logits) + nbytes(temperature), 4 * logits.numel())


@op(
    cases=(_case(1, 64), _case(3, 5000), _case(2, 9001, masked=True), _case(256, 129280, bench=True)),
    dtypes=(torch.float32,),
    tolerance={torch.float32: (1e-4, 1e-9)},
    cost=_cost,
)
def softmax(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """logits [S, V] fp32 (-inf: never), temperature [S] fp32 > 0 -> softmax(logits / temperature) [S, V] fp32."""
    return torch.softmax(logits / temperature.unsqueeze(-1), -1)
