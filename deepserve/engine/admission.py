"""What the engine itself refuses, whoever asks: the last check before a request's numbers reach tensors. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepserve.errors import AskError
from deepserve.messages import NewRequest
from deepserve.request import Request

if TYPE_CHECKING:
    from deepserve.plan import Plan


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds of one request, and of the requests that are waiting or running at a time (None: no bound)."""

    vocab_size: int
    max_model_len: int
    max_open_requests: int | None = None

    @classmethod
    def of(cls, plan: Plan) -> RequestLimits:
        """The plan's."""
        queued = plan.max_num_queued_reqs
        return cls(
            plan.architecture.vocab_size,
            min(plan.max_model_len, plan.num_blocks * plan.block_size),
            None if queued is None else plan.max_num_seqs + queued,
        )

    def admit(self, new: NewRequest, num_open: int) -> Request:
        """The request as the scheduler knows it; AskError where it cannot be served.

        Without max_tokens it may go on to the end of the context.
        """
        num_prompt_tokens, sampling = len(new.prompt_token_ids), new.sampling
        room = self.max_model_len - num_prompt_tokens
        if self.max_open_requests is not None and num_open >= self.max_open_requests:
            raise AskError(
                f"{num_open} requests are waiting or running", hint="ask later", status=429, code="queue_full"
            )
        if num_prompt_tokens == 0:
            raise AskError("is empty", field="prompt", hint="at least one token")
        if room < 1:
            raise AskError(
                f"has {num_prompt_tokens} tokens, the context is {self.max_model_len}",
                field="prompt",
                hint=f"at most {self.max_model_len - 1}, so that one more fits",
                code="context_length_exceeded",
            )
        for name in ("min_tokens", "max_tokens"):
            if (getattr(sampling, name) or 0) > room:
                raise AskError(
                    f"is {getattr(sampling, name)}; after a prompt of {num_prompt_tokens} tokens the context of "
                    f"{self.max_model_len} has room for {room}",
                    field=name,
                    hint=f"ask for at most {room}",
                    code="context_length_exceeded",
                )
        self._check_ids("prompt", new.prompt_token_ids)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", sampling.logit_bias)
        self._check_ids("allowed_token_ids", sampling.allowed_token_ids or ())
        for word in sampling.bad_words_ids:
            self._check_ids("bad_words", word)
        return Request(
            new.request_id,
            list(new.prompt_token_ids),
            num_prompt_tokens,
            sampling,
            sampling.max_tokens or room,
            new.arrival_time,
            new.priority,
            new.cache_salt,
        )

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise AskError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}", field=name)
