"""The offline door: `LLM(model).generate(prompts)` runs the whole engine in this process."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from deepserve.build import build_engine
from deepserve.chat.chat import Chat
from deepserve.chat.conversation import Conversation, read_messages, read_tools
from deepserve.chat.reader import ReplyReader
from deepserve.engine.garbage import Garbage
from deepserve.errors import AskError
from deepserve.facts import gather_facts
from deepserve.log import get_logger
from deepserve.messages import DraftCounts, NewRequest, RequestDelta, TokenLogprobs
from deepserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from deepserve.plan import make_plan
from deepserve.progress import Progress
from deepserve.sampling_params import SamplingParams
from deepserve.spellings import config_of
from deepserve.tokenizer.decode import SequenceDecoder
from deepserve.tokenizer.encode import Tokenizer

log = get_logger(__name__)

Prompt = str | list[int] | dict[str, Any]
NewReader = Callable[[], ReplyReader]


class LLM:
    """An engine in this process. `fields` are those of Config, with vLLM's names: `LLM("path", max_model_len=4096)`.

    Not thread-safe: one `generate` at a time.
    """

    def __init__(self, model: str, **fields: Any):
        config, lines = config_of(model=str(model), **fields)
        for line in lines:
            log.warning(line)
        self.plan = make_plan(config, gather_facts(config))
        path = self.plan.tokenizer_path
        self.tokenizer = Tokenizer.from_directory(path) if path else None
        self._chat = Chat(self.tokenizer, self.plan.architecture.family, path) if self.tokenizer else None
        self.engine = build_engine(self.plan)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput a prompt, in their order.

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}. `sampling_params` is one
        for all or a list with one each; without, the checkpoint's own defaults. AskError names the prompt that cannot
        be honoured, before any of them runs.
        """
        several = _as_list(prompts)
        return self._run(several, True, sampling_params, priority, use_tqdm)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, in the checkpoint's own encoding; outputs say what was thought,
        answered and called. `chat_template_kwargs` switch thinking (`thinking`, `enable_thinking`, `reasoning_effort`)
        and are what else a checkpoint's template reads.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        self.get_tokenizer()
        assert self._chat is not None
        texts: list[Prompt] = []
        readers: list[NewReader | None] = []
        params = list(self._params(sampling_params, len(conversations)))
        for index, one in enumerate(conversations):
            with _naming(index):
                asked = Conversation(
                    read_messages(one),
                    read_tools(tools),
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    arguments=dict(chat_template_kwargs or {}),
                )
                prompt = self._chat.prompt(asked)
                texts.append(prompt.text)
                readers.append(partial(self._chat.reader, asked, prompt))
                form = self._chat.form(asked, prompt, params[index].structured_outputs)
                params[index] = dataclasses.replace(params[index], structured_outputs=form)
        return self._run(texts, False, params, None, use_tqdm, readers)

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; AskError if it has none."""
        if self.tokenizer is None:
            raise AskError("there is none", field="tokenizer", hint="pass token ids, or tokenizer=DIRECTORY")
        return self.tokenizer

    def get_metrics(self) -> dict[str, Any]:
        """The engine's counters since start and its state after the last step."""
        return dataclasses.asdict(self.engine.stats())

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes."""
        self.engine.reset_prefix_cache()
        return True

    def shutdown(self) -> None:
        """Ends the engine's threads. The object is of no use afterwards."""
        self.engine.close()

    def _run(
        self,
        prompts: Sequence[Prompt],
        add_special_tokens: bool,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        use_tqdm: bool,
        new_readers: Sequence[NewReader | None] | None = None,
    ) -> list[RequestOutput]:
        new_readers = new_readers or [None] * len(prompts)
        params = self._params(sampling_params, len(prompts))
        if priority is not None and len(priority) != len(prompts):
            raise AskError(f"{len(priority)} of them for {len(prompts)} prompts", field="priority")
        jobs: dict[str, _Answer] = {}
        try:
            outputs = []
            for index, prompt in enumerate(prompts):
                with _naming(index):
                    text, ids = self._read(prompt, add_special_tokens)
                    rank = priority[index] if priority else 0
                    output = self._submit(text, ids, params[index], rank, jobs, new_readers[index])
                outputs.append(output)
            with Garbage() as garbage:
                self._drive(jobs, Progress(len(prompts)) if use_tqdm else None, garbage)
        finally:
            self.engine.abort([request_id for request_id, job in jobs.items() if not job.output.finished])
        _warn_of_short_answers(params, outputs)
        return outputs

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        if params is None:
            params = SamplingParams(**self.plan.default_sampling)
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise AskError(
                f"{len(params)} of them for {count} prompts", field="sampling_params", hint="one, or one each"
            )
        return params

    def _read(self, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of any form of prompt."""
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise AskError(f"has {sorted(prompt)}", field="prompt", hint="prompt or prompt_token_ids")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if ids is None:
            if not isinstance(text, str):
                raise AskError(f"is a {type(text).__name__}", field="prompt", hint="a text or a list of token ids")
            ids = self.get_tokenizer().encode(text, add_special_tokens, self.plan.max_model_len)
        if not isinstance(ids, list | tuple) or not all(type(token) is int for token in ids):
            raise AskError("is no list of integers", field="prompt_token_ids")
        return text, list(ids)

    def _submit(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        priority: int,
        jobs: dict[str, _Answer],
        new_reader: NewReader | None,
    ) -> RequestOutput:
        """Puts the n sequences of one prompt into the engine's queue; nothing is computed yet."""
        if max(params.logprobs or 0, params.prompt_logprobs or 0) > self.plan.max_logprobs:
            raise AskError(f"above max_logprobs {self.plan.max_logprobs}", field="logprobs", hint="raise max_logprobs")
        if params.structured_outputs is not None:
            self.engine.grammars.check(params.structured_outputs)
        request_id = str(next(self._numbers))
        bad_words = self.get_tokenizer().encode_bad_words(params.bad_words) if params.bad_words else []
        arrival = time.time()
        output = RequestOutput(request_id, text, ids, [], False, RequestMetrics(arrival))
        for index in range(params.n):
            own_id = request_id if params.n == 1 else f"{request_id}-{index}"
            seed = None if params.seed is None else (params.seed + index) % 2**64
            own = dataclasses.replace(params, n=1, seed=seed, bad_words_ids=[*params.bad_words_ids, *bad_words])
            answer = CompletionOutput(index, "", [])
            kept_ids = self._chat.mark_ids if self._chat and new_reader else frozenset()
            decoder = SequenceDecoder(self.tokenizer, ids, own, kept_ids)
            job = _Answer(output, answer, decoder, self.tokenizer, new_reader() if new_reader else None)
            self.engine.add(NewRequest(own_id, ids, own, arrival, priority))
            jobs[own_id] = job
            output.outputs.append(answer)
        return output

    def _drive(self, jobs: dict[str, _Answer], progress: Progress | None, garbage: Garbage) -> None:
        """Steps the engine until every answer is finished."""
        num_unfinished = len(jobs)
        while num_unfinished:
            for delta in self.engine.step().deltas:
                job = jobs.get(delta.request_id)
                if job is None or job.output.finished:
                    continue
                if job.take(delta):
                    num_unfinished -= 1
                    if delta.finish_reason is None:  # a stop string, which the engine does not know of
                        self.engine.abort([delta.request_id])
                    if progress is not None and job.request.finished:
                        progress.add(job.request)
            garbage.sweep()
        if progress is not None:
            progress.close()


class _Answer:
    """One sequence on its way from deltas to a CompletionOutput."""

    def __init__(
        self,
        request: RequestOutput,
        output: CompletionOutput,
        decoder: SequenceDecoder,
        tokenizer: Tokenizer | None,
        reader: ReplyReader | None,
    ):
        self.request = request
        self.reader = reader
        self.output = output
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.pieces: list[str] = []

    def take(self, delta: RequestDelta) -> bool:
        """Adds what a step brought; True when this was the last of it."""
        piece, output, request = self.decoder.push(delta), self.output, self.request
        metrics = request.metrics
        if piece.token_ids and not metrics.first_token_time:
            metrics.first_token_time = time.time()
        if delta.scheduled_time and not metrics.first_scheduled_time:
            metrics.first_scheduled_time = delta.scheduled_time
            request.num_cached_tokens = delta.num_cached_tokens
        self.pieces.append(piece.text)
        output.token_ids += piece.token_ids
        for entry in piece.logprobs:
            output.logprobs = output.logprobs or []
            output.logprobs.append(_readable(entry, self.tokenizer))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + entry.logprobs[0]
        if delta.prompt_logprobs is not None and request.prompt_logprobs is None:
            told = delta.prompt_logprobs
            request.prompt_logprobs = [_readable(entry, self.tokenizer) if entry else None for entry in told]
        if piece.finish_reason is None:
            return False
        output.text = "".join(self.pieces)
        if self.reader is not None:
            self.reader.read(output.text, output.token_ids, True)
            reply = self.reader.reply
            output.reasoning, output.content, output.tool_calls = reply.reasoning or None, reply.content, reply.calls
            piece.finish_reason = self.reader.finish_reason(piece.finish_reason)
        output.finish_reason, output.stop_reason, output.error = piece.finish_reason, piece.stop_reason, delta.error
        if delta.error:
            log.error("request %s: %s", delta.request_id, delta.error)
        metrics.num_preemptions += delta.num_preemptions
        if delta.drafts is not None:
            metrics.drafts = (metrics.drafts or DraftCounts()) + delta.drafts
        metrics.finished_time = time.time()
        request.finished = all(one.finished for one in request.outputs)
        return True


def _readable(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """{token id: Logprob}, the chosen token first."""
    found: dict[int, Logprob] = {}
    for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks):
        found.setdefault(token, Logprob(logprob, rank, tokenizer.decode([token]) if tokenizer else None))
    return found


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt (a text, a dict, or a list of token ids) becomes a list of one."""
    if not isinstance(prompts, Iterable):
        raise AskError(f"is a {type(prompts).__name__}", field="prompts", hint="a text, or a list of prompts")
    if isinstance(prompts, str | dict) or (prompts and all(isinstance(item, int) for item in prompts)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Puts the index of a prompt into the AskError that it causes."""
    try:
        yield
    except AskError as error:
        field = f"prompts[{index}]" + (f".{error.field}" if error.field else "")
        raise AskError(error.message, field=field, hint=error.hint, status=error.status, code=error.code) from None


def _warn_of_short_answers(params: Sequence[SamplingParams], outputs: list[RequestOutput]) -> None:
    default = SamplingParams().max_tokens
    cut = sum(
        one.max_tokens == default and any(answer.finish_reason == "length" for answer in output.outputs)
        for one, output in zip(params, outputs)
    )
    if cut:
        log.warning("%d prompts were answered up to max_tokens=%d, the default", cut, default)
