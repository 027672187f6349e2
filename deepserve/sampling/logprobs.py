"""Log-probabilities of the unmodified distribution: of the chosen token, with its rank, and of the likeliest ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepserve.messages import TokenLogprobs


def token_logprobs(logits: torch.Tensor, chosen: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """logits [S, V] fp32, chosen [S] int64; `counts[i]` top tokens for row i. Rank: 1 + how many are likelier."""
    logprobs = torch.log_softmax(logits, -1)
    of_chosen = logprobs.gather(1, chosen.unsqueeze(1))
    ranks = (logprobs > of_chosen).sum(-1) + 1
    values, ids = logprobs.topk(min(max(counts, default=0), logits.shape[1]), -1)
    rows = zip(chosen.tolist(), of_chosen.squeeze(1).tolist(), ranks.tolist(), ids.tolist(), values.tolist(), counts)
    return [
        TokenLogprobs(
            [token, *top_ids[:count]], [logprob, *top[:count]], [rank, *range(1, min(count, len(top_ids)) + 1)]
        )
        for token, logprob, rank, top_ids, top, count in rows
    ]
