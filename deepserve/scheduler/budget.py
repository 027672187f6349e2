"""How much one step may hold, and what one request may take of it. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from deepserve.errors import AskError


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Limits of one step: rows, tokens, and tokens of one request while it has more than one to compute.

    long_prefill_token_threshold 0 means no limit of its own. Without chunked prefill a request's uncomputed tokens go
    into one step or wait.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise AskError(f"is {self.max_num_seqs}, at least 1", field="max_num_seqs")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise AskError(
                f"{self.max_num_batched_tokens} tokens cannot hold one for each of max_num_seqs {self.max_num_seqs}",
                field="max_num_batched_tokens",
                hint=f"at least {self.max_num_seqs}",
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise AskError(
                f"{self.max_num_batched_tokens} tokens do not hold a prompt of max_model_len {self.max_model_len}",
                field="max_num_batched_tokens",
                hint=f"at least {self.max_model_len}, or leave chunked prefill on",
            )

    def share(self, num_uncomputed: int, budget: int) -> int:
        """Tokens that a request with `num_uncomputed` of them gets from what is left of the step, 0 if it must wait."""
        if not self.enable_chunked_prefill:
            return num_uncomputed if num_uncomputed <= budget else 0
        threshold = self.long_prefill_token_threshold
        return min(num_uncomputed, budget, threshold) if threshold > 0 else min(num_uncomputed, budget)
