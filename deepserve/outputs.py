"""What the offline engine gives back: vLLM's names for the same things. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deepserve.messages import TokenLogprobs
from deepserve.tokenizer.encode import Tokenizer


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
    def time_in_queue(self) -> float:
        """Arrival to the first step it was in."""
        return self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float:
        """Arrival to first token."""
        return self.first_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n answers. `logprobs` has one {token id: Logprob} a token, where asked."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

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


@dataclass(slots=True)
class Answer:
    """A CompletionOutput in the making."""

    output: CompletionOutput
    pieces: list[str] = field(default_factory=list)

    def add_logprobs(self, entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None) -> None:
        """Appends one entry a token and adds up the chosen tokens'."""
        for entry in entries:
            if self.output.logprobs is None:
                self.output.logprobs, self.output.cumulative_logprob = [], 0.0
            self.output.logprobs.append(readable(entry, tokenizer))
            self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + entry.logprobs[0]


def readable(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """{token id: Logprob}, the chosen token first."""
    found: dict[int, Logprob] = {}
    for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks):
        text = tokenizer.decode([token]) if tokenizer is not None else None
        found.setdefault(token, Logprob(logprob, rank, text))
    return found
