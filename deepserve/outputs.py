"""What the offline engine gives back: vLLM's names for the same things. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """A token's log-probability at its position; `rank` counts from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of time.time."""

    arrival_time: float
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    num_preemptions: int = 0

    @property
    def ttft(self) -> float:
        """Arrival to first token."""
        return self.first_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n answers. `logprobs` has one {token id: Logprob} a token, where asked.

    finish_reason: stop, length, abort or error (then `error` says what happened).
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers. `prompt_logprobs` has one entry a prompt token, the first None, where asked."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
