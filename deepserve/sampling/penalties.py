"""Penalties on tokens that were seen: repetition (prompt and output), frequency and presence (output)."""

from __future__ import annotations

import torch


def penalise(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    num_prompt_tokens: torch.Tensor,
    num_tokens: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """logits [S, V] fp32 with the penalties of OpenAI and, for repetition, of CTRL (Keskar et al. 2019).

    token_ids [S, L] int64: each row's prompt and output, `num_tokens` [S] of them valid, `num_prompt_tokens` [S] of the
    prompt; the rest fp32 [S]. Seen: logit / r if positive, else logit * r; then - frequency * n - presence * (n > 0)
    for a token that was put out n times. Counts are integers, so a row does not depend on how rows are put together.
    """
    num_rows, vocab_size = logits.shape
    position = torch.arange(token_ids.shape[1], device=logits.device)
    valid = position < num_tokens.unsqueeze(1)
    put_out = valid & (position >= num_prompt_tokens.unsqueeze(1))
    # A column beyond the vocabulary takes what does not count.
    outside = torch.full_like(token_ids, vocab_size)
    counts = torch.zeros(num_rows, vocab_size + 1, dtype=torch.int32, device=logits.device)
    ones = torch.ones_like(token_ids, dtype=torch.int32)
    seen = counts.scatter_add(1, torch.where(valid, token_ids, outside), ones)[:, :-1] > 0
    output_counts = counts.scatter_add_(1, torch.where(put_out, token_ids, outside), ones)[:, :-1]
    factor = repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(seen, repeated, logits)
    logits = logits - frequency.unsqueeze(1) * output_counts
    return logits - presence.unsqueeze(1) * (output_counts > 0)
