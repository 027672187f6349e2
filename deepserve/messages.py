"""What crosses the line between a door (LLM, server) and the engine: plain closed dataclasses, no torch.

In-process they are passed as they are; between processes `engine/transport.py` encodes them by these types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest

from deepserve.sampling_params import SamplingParams


@dataclass(slots=True)
class NewRequest:
    """One sequence to generate (n > 1 is split into n of these by the door, each with its own id and seed)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_time: float
    priority: int = 0
    cache_salt: str | None = None


@dataclass(slots=True)
class AbortRequests:
    """Ends these requests wherever they are; unknown ids are ignored (they may just have finished)."""

    request_ids: list[str]


@dataclass(slots=True)
class Control:
    """A verb for the engine itself: reset_prefix_cache, drain, shutdown."""

    verb: str
    ticket: int = 0


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's first, then the top ones. Ranks count from 1."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(slots=True)
class DraftCounts:
    """What became of drafts: how often a row had some, how many, and how many were accepted as the 1st, 2nd ... of one.

    A row with drafts adds one token more than were accepted: mean acceptance length is 1 + accepted / rows.
    """

    num_drafts: int = 0  # rows with drafts (vLLM's word for a proposal of several tokens)
    num_draft_tokens: int = 0
    num_accepted_by_position: list[int] = field(default_factory=list)

    @property
    def num_accepted_tokens(self) -> int:
        """Accepted ones at any position."""
        return sum(self.num_accepted_by_position)

    @property
    def mean_length(self) -> float:
        """Tokens that a row with drafts added on average; 0 before there was one."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 0.0

    @property
    def rates(self) -> list[float]:
        """Share of the rows with drafts whose 1st, 2nd ... draft was accepted."""
        return [count / max(self.num_drafts, 1) for count in self.num_accepted_by_position]

    def add(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Counts one row."""
        if num_draft_tokens:
            self.num_drafts += 1
            self.num_draft_tokens += num_draft_tokens
            counts = self.num_accepted_by_position
            counts += [0] * (num_draft_tokens - len(counts))
            for position in range(num_accepted):
                counts[position] += 1

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return self._with(other, 1)

    def __sub__(self, before: DraftCounts) -> DraftCounts:
        return self._with(before, -1)

    def _with(self, other: DraftCounts, sign: int) -> DraftCounts:
        both = zip_longest(self.num_accepted_by_position, other.num_accepted_by_position, fillvalue=0)
        return DraftCounts(
            self.num_drafts + sign * other.num_drafts,
            self.num_draft_tokens + sign * other.num_draft_tokens,
            [mine + sign * theirs for mine, theirs in both],
        )


@dataclass(slots=True)
class RequestDelta:
    """What one step added to one request. `finish_reason`: None while running, else stop, length, abort or error."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a new token, where asked
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first token; entry 0 is None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token id that ended it; the door sets stop strings
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    scheduled_time: float = 0.0  # when it first got into a batch (time.time)
    num_preemptions: int = 0
    drafts: DraftCounts | None = None  # of the whole request, with its last delta, where there were any
    error: str | None = None
    error_status: int = 500  # what an HTTP door answers with it: 4xx where the engine refused the request


@dataclass(slots=True)
class EngineStats:
    """A snapshot after a step. Counters are totals since start."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0 to 1
    num_steps: int
    num_prefix_queries: int  # tokens looked up
    num_prefix_hits: int  # tokens found
    num_preemptions: int
    num_scheduled_tokens: int  # in this step
    step_time: float  # seconds, schedule to publish
    time: float  # time.time of the snapshot: the heartbeat
    drafts: DraftCounts = field(default_factory=DraftCounts)
    num_compiled_kernels: int = 0  # since the start was over


@dataclass(slots=True)
class StepOutput:
    """All that one engine step publishes."""

    deltas: list[RequestDelta]
    stats: EngineStats


@dataclass(slots=True)
class ControlDone:
    """The answer to a Control with the same ticket."""

    ticket: int
    ok: bool
    message: str = ""


@dataclass(slots=True)
class Phase:
    """A phase of an engine's start is over, and took so many seconds."""

    name: str
    seconds: float


@dataclass(slots=True)
class Ready:
    """The engine takes requests from now on."""

    stats: EngineStats


@dataclass(slots=True)
class EngineFailed:
    """The last word of an engine that cannot start or go on. `asked`: the reason is an AskError, with its hint."""

    reason: str
    asked: bool = False
    field: str | None = None
    hint: str | None = None
