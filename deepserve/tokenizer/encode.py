"""Text to token ids with the checkpoint's tokenizer.json, and what tokenizer_config.json says about it. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from deepserve.errors import AskError
from deepserve.json_file import read_object
from deepserve.tokenizer.template import ChatTemplate, pick_template

TOO_LONG_HINT = "shorten the prompt or raise --max-model-len"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A checkpoint's tokenizer. Thread-safe: encode and decode change nothing.

    `special_ids` are the control tokens (bos, eos, role marks), `byte_ids` the <0xXX> tokens of byte fallback.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], templates: dict[str, str] | None = None):
        self.backend = backend
        self.config = config
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = _special_tokens(config)
        self.bos_token_id = self._id(self.special_tokens.get("bos_token"))
        self.eos_token_id = self._id(self.special_tokens.get("eos_token"))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.byte_ids = frozenset(
            token for text, token in self._vocabulary.items() if text.startswith("<0x") and _BYTE_TOKEN.fullmatch(text)
        )
        self.templates = {name: ChatTemplate(text) for name, text in (templates or {}).items()}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja; AskError where one is broken."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            hint = "give --tokenizer a directory that holds tokenizer.json (tokenizer.model alone is not read)"
            raise AskError(f"{file} does not exist", field="tokenizer", hint=hint)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 (the library raises plain Exception)
            raise AskError(f"{file} cannot be read: {error}", field="tokenizer") from None
        config = read_object(folder / "tokenizer_config.json", "tokenizer")
        return cls(backend, config, pick_template(folder, config))

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that means anything."""
        return max(self._vocabulary.values(), default=-1) + 1

    @cached_property
    def max_token_chars(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._vocabulary), default=1)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def _edges(self) -> tuple[bool, bool]:
        """Whether the tokenizer's own post-processor puts bos in front and eos at the end."""
        ids = self.backend.encode("a").ids
        return bool(ids) and ids[0] == self.bos_token_id, bool(ids) and ids[-1] == self.eos_token_id

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`. With `max_tokens` it is a prompt: refused where it is empty, and where it cannot fit
        before the work of encoding it is done.
        """
        if max_tokens is not None and not text:
            raise AskError("is empty", field="prompt", hint="at least one character")
        if max_tokens is not None and len(text) > max_tokens * self.max_token_chars:
            raise AskError(
                f"the text has {len(text)} characters; {max_tokens} tokens hold at most "
                f"{max_tokens * self.max_token_chars}",
                field="prompt",
                hint=TOO_LONG_HINT,
                code="context_length_exceeded",
            )
        try:
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise AskError("is not valid Unicode text (a lone surrogate?)", field="prompt") from None
        if add_special_tokens:
            ids = self._put_edges(ids)
        if max_tokens is not None and len(ids) > max_tokens:
            raise AskError(
                f"the prompt has {len(ids)} tokens, at most {max_tokens} fit",
                field="prompt",
                hint=TOO_LONG_HINT,
                code="context_length_exceeded",
            )
        return ids

    def _put_edges(self, ids: list[int]) -> list[int]:
        """Follows add_bos_token and add_eos_token of tokenizer_config.json where they differ from tokenizer.json."""
        has_bos, has_eos = self._edges
        wants_bos, wants_eos = self.config.get("add_bos_token"), self.config.get("add_eos_token")
        if self.bos_token_id is not None and wants_bos is not None and bool(wants_bos) != has_bos:
            ids = [self.bos_token_id, *ids] if wants_bos else ids[1:]
        if self.eos_token_id is not None and wants_eos is not None and bool(wants_eos) != has_eos:
            ids = [*ids, self.eos_token_id] if wants_eos else ids[:-1]
        return ids

    def encode_bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """The token sequences of each word, at the start of a text and after a space."""
        found: list[list[int]] = []
        for word in words:
            for text in (word, " " + word.lstrip()):
                ids = self.backend.encode(text, add_special_tokens=False).ids
                if ids and ids not in found:
                    found.append(ids)
        return found

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of the whole sequence; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def knows(self, token_id: int) -> bool:
        """Whether the id has a text (a model's vocabulary is often padded beyond its tokenizer's)."""
        return self.backend.id_to_token(token_id) is not None

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation by the checkpoint's chat template; encode it without special tokens.

        `variables` (tools, thinking ...) are passed to the template. AskError where there is no template or it refuses.
        """
        if not messages or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
            raise AskError("are a list of at least one message, each with a role", field="messages")
        name = "tool_use" if variables.get("tools") and "tool_use" in self.templates else "default"
        if name not in self.templates:
            hint = "send a prompt instead of messages, or add chat_template.jinja to the tokenizer's directory"
            raise AskError("this checkpoint has no chat template", field="messages", hint=hint)
        if add_generation_prompt and continue_final_message:
            raise AskError(
                "continues the last message, so no new one can begin",
                field="continue_final_message",
                hint="set add_generation_prompt to false",
            )
        variables = {**self.special_tokens, **variables, "add_generation_prompt": add_generation_prompt}
        return self.templates[name].render(messages, continue_final_message, variables)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ... by name; each is a text or {"content": text}."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token") and not name.startswith("add_"):
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
    return found
