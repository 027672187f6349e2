"""What only the plan can say about a request: does it fit the context, the vocabulary, the bounds. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from deepserve.engine.admission import RequestLimits
from deepserve.errors import AskError
from deepserve.messages import NewRequest
from deepserve.plan.plan import Plan
from deepserve.sampling_params import SamplingParams
from deepserve.server import limits


def check_prompt(prompt: list[int], sampling: SamplingParams, default: int | None, plan: Plan) -> int:
    """The number of tokens to generate after this prompt: what was asked, or the default as far as the context goes.

    Asks what the engine will ask, before anything is sent to it.
    """
    room = RequestLimits.of(plan).admit(NewRequest("", prompt, sampling, 0.0), 0).max_tokens
    return sampling.max_tokens or min(room, max(default or room, sampling.min_tokens))


def check_vocabulary(name: str, token_ids: Iterable[int], plan: Plan) -> None:
    """Refuses ids that the model has no row for."""
    size = plan.architecture.vocab_size
    for token in token_ids:
        if not 0 <= token < size:
            raise AskError(f"token id {token} is not in the vocabulary of {size}", field=name)


def check_sampling(sampling: SamplingParams, num_prompts: int, priority: int | None, plan: Plan) -> None:
    """Refuses what does not go with this plan or with itself."""
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise AskError("is empty: nothing could be generated", field="allowed_token_ids", hint="leave it out")
    if num_prompts * sampling.n > limits.MAX_SEQUENCES:
        raise AskError(
            f"{num_prompts} prompts x n {sampling.n} are {num_prompts * sampling.n} sequences, at most "
            f"{limits.MAX_SEQUENCES} in a request",
            field="n",
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(sampling, name) or 0) > plan.max_logprobs:
            raise AskError(
                f"is {getattr(sampling, name)}, at most {plan.max_logprobs}", field=name, hint="--max-logprobs"
            )
    if priority and plan.scheduling_policy != "priority":
        hint = "start the server with --scheduling-policy priority"
        raise AskError(f"is {priority}, but requests are served in their order", field="priority", hint=hint)


def check_work(prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], sampling: SamplingParams) -> None:
    """Refuses a response whose log-probabilities alone would fill the memory: lengths x top entries are bounded."""
    total = sampling.n * sum(
        len(prompt) * _entries(sampling.prompt_logprobs) + length * _entries(sampling.logprobs)
        for prompt, length in zip(prompts, max_tokens)
    )
    if total > limits.MAX_LOGPROB_ENTRIES:
        raise AskError(
            f"up to {total:,} log-probabilities in one response, at most {limits.MAX_LOGPROB_ENTRIES:,}",
            field="logprobs",
            hint="fewer prompts, a smaller n or max_tokens",
        )


def _entries(top: int | None) -> int:
    return 0 if top is None else top + 1


def split(sampling: SamplingParams, max_tokens: int) -> list[SamplingParams]:
    """One SamplingParams for each of n sequences; with a seed, the i-th has seed + i."""

    def seed(index: int) -> int | None:
        return None if sampling.seed is None else (sampling.seed + index) % 2**64

    return [dataclasses.replace(sampling, n=1, seed=seed(index), max_tokens=max_tokens) for index in range(sampling.n)]
