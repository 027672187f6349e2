"""A token drawn from each row's distribution, after min-p, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepserve.ops.op import Case, Cost, integers, nbytes, normal, op


def _peaked(generator: torch.Generator, shape: tuple[int, int], device: str) -> torch.Tensor:
    """A few tokens with most of the mass and a long tail, as after most words of a text."""
    return (-1.5 * torch.rand(shape, generator=generator).clamp_(min=1e-9).log_()).to(device)


def _broken(generator: torch.Generator, shape: tuple[int, int], device: str) -> torch.Tensor:
    """Rows without a token to give between rows with one."""
    logits = normal(generator, shape, torch.float32, device)
    logits[1, 3] = torch.nan
    logits[2, shape[1] // 2] = torch.inf
    logits[3] = -torch.inf
    logits[4, -1], logits[4, 0] = torch.nan, -torch.inf
    logits[5] = torch.nan
    return logits


def _masked(generator: torch.Generator, shape: tuple[int, int], device: str) -> torch.Tensor:
    """Few tokens that may come at all, as a grammar leaves them."""
    logits = normal(generator, shape, torch.float32, device)
    logits[:, integers(generator, shape[1], (shape[1] - shape[1] // 50,), device)] = -torch.inf
    logits[:, shape[1] // 3] = 0.0
    return logits


LOGITS: dict[str, Callable[[torch.Generator, tuple[int, int], str], torch.Tensor]] = {
    "flat": lambda generator, shape, device: normal(generator, shape, torch.float32, device),
    "peaked": _peaked,
    "ties": lambda generator, shape, device: integers(generator, 5, shape, device).float().sub_(2.0),
    "equal": lambda generator, shape, device: torch.full(shape, -1.5).to(device),
    "zeros": lambda generator, shape, device: torch.randn(shape, generator=generator).mul_(0.0).to(device),
    "masked": _masked,
    "broken": _broken,
}


def _case(kind: str, num_rows: int, vocab_size: int, *filters: str, bench: bool = False) -> Case:
    """`filters`: those that rows have; "mixed": every row its own, greedy ones among them."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        def some(name: str, values: torch.Tensor, none: float) -> torch.Tensor:
            chance = 0.5 if "mixed" in filters else float(name in filters)
            return values.where(torch.rand(num_rows, generator=generator) < chance, none)

        logits = LOGITS[kind](generator, (num_rows, vocab_size), device)
        temperature = 0.3 + 1.5 * torch.rand(num_rows, generator=generator)
        top_k = some("top_k", 1 + integers(generator, 100, (num_rows,), "cpu"), 0)
        top_p = some("top_p", 1 - torch.rand(num_rows, generator=generator, dtype=torch.float64).square(), 1.0)
        min_p = some("min_p", 0.3 * torch.rand(num_rows, generator=generator), 0.0)
        uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        top_k[2::7] = torch.where(top_k[2::7] > 0, vocab_size * 2, 0)  # more than there are
        uniform[3::5] = 0.0
        if "mixed" in filters:
            top_k[1::4] = 1
        log_min_p = temperature * min_p.log()
        rows = (temperature, top_k, top_p, log_min_p, uniform)
        return logits, *(values.to(device) for values in rows), bool(filters)

    name = "-".join((f"S{num_rows}-V{vocab_size}-{kind}", *filters))
    return Case(name, make, bench)


def _cost(logits: torch.Tensor, *rest: Any) -> Cost:
    return Cost(nbytes(logits) + 48 * len(logits), 4 * logits.numel())


@op(
    cases=(
        _case("flat", 1, 64),
        _case("flat", 2, 700),
        _case("peaked", 2, 30000, "top_k"),
        _case("peaked", 2, 30000, "top_p"),
        _case("flat", 2, 30000, "top_p"),
        _case("peaked", 2, 3000, "min_p"),
        _case("peaked", 2, 30000, "top_k", "top_p", "min_p"),
        _case("flat", 4, 1300, "mixed"),
        _case("ties", 4, 500, "mixed"),
        _case("equal", 3, 333, "mixed"),
        _case("zeros", 2, 100, "mixed"),
        _case("masked", 2, 1000, "mixed"),
        _case("broken", 7, 200, "mixed"),
        _case("peaked", 256, 129280, bench=True),
        _case("peaked", 256, 129280, "top_p", bench=True),
        _case("flat", 256, 129280, "top_p", bench=True),
        _case("peaked", 256, 129280, "mixed", bench=True),
        _case("peaked", 1, 129280, "top_k", "top_p", bench=True),
    ),
    dtypes=(torch.float32,),
    cost=_cost,
)
def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    uniform: torch.Tensor,
    filtered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 [S, V], temperature fp32 [S] > 0 -> (token ids int64 [S], evidence fp32 [S]: the largest logits).

    With tokens in the order of falling logits, of equal ones lower ids first, a row keeps those within -log_min_p (fp32
    [S]: temperature * ln(min_p), -inf: all) of its largest logit, of these the first top_k (int64 [S], 0: all), and of
    these the fewest that have the share top_p (fp64 [S], 1: all) of their mass exp(logit / temperature); without
    `filtered` it keeps all. In the order of the vocabulary, the token is the first at which the kept mass so far is
    above uniform (fp64 [S] in [0, 1)) times all of it. Masses and sums are fp64: fp32 would lose a long tail.

    A row with NaN or inf, or with -inf alone, has no token to give: its evidence is not finite, and its token 0.
    """
    best = logits.amax(-1, keepdim=True)
    masses = ((logits.double() - best) / temperature.unsqueeze(1)).exp()
    if filtered:
        masses = keep_leading(logits, masses, best + log_min_p.unsqueeze(1), top_k.unsqueeze(1), top_p.unsqueeze(1))
    sums = masses.cumsum(-1)
    tokens = torch.searchsorted(sums, uniform.unsqueeze(1) * sums[:, -1:], right=True)
    return tokens.where(best.isfinite(), 0).squeeze(1), best.squeeze(1)


def keep_leading(
    logits: torch.Tensor, masses: torch.Tensor, least: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The masses [S, V] of logits [S, V], 0 where the filters (each [S, 1]; `least`: the least logit) drop a token."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    kept = logits.gather(1, order) >= least
    kept &= (torch.arange(logits.shape[1], device=logits.device) < top_k) | (top_k == 0)
    leading = masses.gather(1, order).where(kept, 0.0)
    sums = leading.cumsum(-1)
    kept &= (sums - leading < top_p * sums[:, -1:]) | (top_p >= 1)
    return torch.zeros_like(masses).scatter_(1, order, leading.where(kept, 0.0))
