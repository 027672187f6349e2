"""Row by row, which stays in a core's cache; NumPy's vectorised partition and sort find where the kept tokens end.

A row of 49,152 on one thread: 0.2 ms, with top-k the same, with top-p 0.4, or 1.0 where most tokens are kept; torch's
sort of it alone takes 8.
"""

from __future__ import annotations

import numpy as np
import torch

from deepserve.ops.op import Kernel

LOOK = 1024  # so many of the most probable tokens top-p looks at before it sorts all of them


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    uniform: torch.Tensor,
    filtered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py."""
    evidence = logits.amax(-1)
    tokens = torch.zeros(len(logits), dtype=torch.int64)
    for row, best in enumerate(evidence.tolist()):
        if not np.isfinite(best):
            continue
        values, one = logits[row], float(temperature[row])
        k, p = (int(top_k[row]), float(top_p[row])) if filtered else (0, 1.0)
        if k == 1:
            tokens[row] = int(values.numpy().argmax())
            continue
        ids = None
        if filtered and log_min_p[row] > -torch.inf:
            ids = torch.from_numpy(np.flatnonzero(values.numpy() >= (evidence[row] + log_min_p[row]).numpy()))
            values = values[ids]
        if 0 < k < len(values):
            kept = _leading(values, np.partition(values.numpy(), -k)[-k], k)
            values, ids = values[kept], kept if ids is None else ids[kept]
        masses = _masses(values, best, one)
        if p < 1:
            kept = _leading(values, *_nucleus(values, float(masses.sum()) * p, best, one))
            masses, ids = masses[kept], kept if ids is None else ids[kept]
        sums = masses.cumsum(0)
        place = torch.searchsorted(sums, float(uniform[row]) * sums[-1], right=True)
        tokens[row] = place if ids is None else ids[place]
    return tokens, evidence


def _masses(values: torch.Tensor, best: float, temperature: float) -> torch.Tensor:
    return values.double().sub_(best).div_(temperature).exp_()


def _nucleus(values: torch.Tensor, target: float, best: float, temperature: float) -> tuple[np.ndarray, int]:
    """(The smallest kept logit, how many are kept) where the largest logits are kept until their mass is `target`."""
    for look in (LOOK, len(values)):
        some = values.numpy() if look >= len(values) else np.partition(values.numpy(), -look)[-look:]
        falling = torch.from_numpy(np.sort(some)[::-1].copy())
        sums = _masses(falling, best, temperature).cumsum(0)
        if sums[-1] >= target:
            break
    count = min(int(torch.searchsorted(sums, target)) + 1, len(sums))
    return falling[count - 1].numpy(), count


def _leading(values: torch.Tensor, least: np.ndarray, count: int) -> torch.Tensor:
    """Where the `count` largest values are, of which `least` is the smallest: of equal ones the first."""
    numbers = values.numpy()
    kept = np.flatnonzero(numbers >= least)
    if len(kept) > count:
        equal = np.flatnonzero(numbers[kept] == least)
        kept = np.delete(kept, equal[len(equal) - (len(kept) - count) :])
    return torch.from_numpy(kept)


KERNEL = Kernel("sample", "cpu", sample)
