"""One streamed request against any OpenAI-compatible server, timed chunk by chunk."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from deepserve.bench.dataset import Sample
from deepserve.bench.measures import Outcome


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what each of them carries besides its prompt."""

    base_url: str
    endpoint: str
    model: str
    chat: bool
    headers: dict[str, str] = field(default_factory=dict)
    extra_body: dict[str, Any] = field(default_factory=dict)

    def body(self, sample: Sample) -> dict[str, Any]:
        """The JSON of a request."""
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            body |= {"messages": [{"role": "user", "content": sample.prompt}]}
            body |= {"max_completion_tokens": sample.num_output_tokens}
        else:
            body |= {"prompt": sample.prompt, "max_tokens": sample.num_output_tokens}
        return {**body, **self.extra_body}


async def ask(session: aiohttp.ClientSession, target: Target, sample: Sample) -> Outcome:
    """Send it and read it to the end. Never raises: what went wrong is in the outcome."""
    outcome = Outcome(sample.num_prompt_tokens, start=time.perf_counter())
    try:
        url = target.base_url + target.endpoint
        async with session.post(url, json=target.body(sample), headers=target.headers) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}: {(await response.text())[:300]}"
            else:
                await _read(response, outcome)
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.latency = outcome.latency or time.perf_counter() - outcome.start
    return outcome


async def _read(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    last, usage, done = outcome.start, None, False
    async for data in _events(response):
        if data == b"[DONE]":
            done = True
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise ValueError(chunk["error"].get("message", chunk["error"]))
        usage = chunk.get("usage") or usage
        text, is_token = _content(chunk)
        if not is_token:
            continue
        now = time.perf_counter()
        if not outcome.ttft:
            outcome.ttft = now - outcome.start
        else:
            outcome.itls.append(now - last)
        last, outcome.text = now, outcome.text + text
    if not done:
        raise ValueError("the stream broke off before [DONE]")
    outcome.latency = last - outcome.start
    if usage is None:
        raise ValueError("the server reported no usage, so its tokens cannot be counted")
    outcome.num_output_tokens = usage["completion_tokens"]
    outcome.num_prompt_tokens = usage["prompt_tokens"]
    if not outcome.ttft:
        raise ValueError("the answer has no token")


def _content(chunk: dict[str, Any]) -> tuple[str, bool]:
    """The text of a chunk and whether it stands for tokens: a role or a usage alone does not."""
    if not chunk.get("choices"):
        return "", False
    choice = chunk["choices"][0]
    if "delta" not in choice:
        return choice.get("text") or "", True
    delta = choice["delta"]
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    return text, bool(text) or ("content" in delta and "role" not in delta)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event; comments and blank lines are passed over."""
    held = b""
    async for part in response.content.iter_any():
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
