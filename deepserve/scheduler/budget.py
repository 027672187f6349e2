"""How much one step may hold, and what one request may take of it. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Limits of one step: rows, tokens, and tokens of one request while it has more than one to compute.

    long_prefill_token_threshold 0 means no limit of its own. Without chunked prefill a request's uncomputed tokens go
    into one step or wait. The plan sees to it that a step has a token for each row and that every prompt can go.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True

    def share(self, num_uncomputed: int, budget: int) -> int:
        """Tokens that a request with `num_uncomputed` of them gets from what is left of the step, 0 if it must wait."""
        if not self.enable_chunked_prefill:
            return num_uncomputed if num_uncomputed <= budget else 0
        threshold = self.long_prefill_token_threshold
        return min(num_uncomputed, budget, threshold) if threshold > 0 else min(num_uncomputed, budget)
