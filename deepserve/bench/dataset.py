"""The requests of a load run: random tokens, a file of prompts, or a file of conversations. No torch."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepserve.errors import AskError
from deepserve.tokenizer.encode import Tokenizer


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: a text or token ids, and how many tokens to ask for. `num_prompt_tokens` 0: the server's count."""

    prompt: str | list[int]
    num_output_tokens: int
    num_prompt_tokens: int = 0


def length_drawer(length: int, distribution: str, rng: random.Random) -> Callable[[], int]:
    """Draws lengths: `fixed`; `pm:R` uniform in length x (1 - R, 1 + R), vLLM's meaning; `low:R` in length x (R, 1)."""
    kind, _, text = distribution.partition(":")
    try:
        ratio = float(text or 0)
    except ValueError:
        ratio = -1.0
    if kind not in ("fixed", "pm", "low") or not 0 <= ratio <= 1:
        raise AskError(f"is {distribution!r}", field="length_dist", hint="fixed, pm:0.2 or low:0.8")
    low, high = {"fixed": (1.0, 1.0), "pm": (1 - ratio, 1 + ratio), "low": (ratio, 1.0)}[kind]
    return lambda: max(1, rng.randint(round(length * low), round(length * high)))


def random_samples(
    tokenizer: Tokenizer, lengths: Callable[[], int], outputs: Callable[[], int], prefix: int, rng: random.Random
) -> Iterator[Sample]:
    """Random ordinary tokens without end, each prompt after the same `prefix` of random tokens."""
    known = [token for token in range(tokenizer.vocab_size) if tokenizer.knows(token)]
    ordinary = [token for token in known if token not in tokenizer.special_ids]
    shared = rng.choices(ordinary, k=prefix)
    while True:
        ids = shared + rng.choices(ordinary, k=lengths())
        yield Sample(ids, outputs(), len(ids))


def custom_samples(path: str, num_output_tokens: int | None) -> Iterator[Sample]:
    """JSON lines with "prompt" and perhaps "output_tokens" or "max_tokens", again and again from the top."""
    entries = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            entries.append(_entry(path, number, line))
    if not entries:
        raise AskError(f"{path} holds no prompts", field="dataset_path")
    while True:
        for entry in entries:
            asked = num_output_tokens or entry.get("output_tokens") or entry.get("max_tokens") or 256
            yield Sample(entry["prompt"], asked)


def _entry(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise AskError(f"{path}:{number} is not JSON: {error}", field="dataset_path") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise AskError(f'{path}:{number} has no text "prompt"', field="dataset_path")
    return entry


def sharegpt_samples(
    path: str, tokenizer: Tokenizer, num_output_tokens: int | None, rng: random.Random
) -> Iterator[Sample]:
    """The first question and the length of the first answer of each conversation, in random order without end."""
    try:
        conversations = json.loads(_read(path))
        turns = [[turn["value"] for turn in entry["conversations"][:2]] for entry in conversations]
    except (ValueError, KeyError, TypeError) as error:
        hint = 'a list of {"conversations": [{"value": ...}, {"value": ...}]}'
        raise AskError(f"{path} is not in ShareGPT's form: {error!r}", field="dataset_path", hint=hint) from None
    pairs = [pair for pair in turns if len(pair) == 2]
    if not pairs:
        raise AskError(f"{path} holds no conversation of two turns", field="dataset_path")
    while True:
        question, answer = rng.choice(pairs)
        prompt, output = tokenizer.encode(question), num_output_tokens or len(tokenizer.encode(answer, False))
        if len(prompt) >= 4 and output >= 4:
            yield Sample(question, output, len(prompt))


def _read(path: str) -> str:
    if not path:
        raise AskError("is missing", field="dataset_path", hint="--dataset-path FILE")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AskError(f"{path} cannot be read: {error}", field="dataset_path") from None
