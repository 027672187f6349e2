"""Chat templates: the checkpoint's own Jinja text, run in an immutable sandbox. Messages are data, never templates."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from deepserve.errors import AskError


def pick_template(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template texts by name (default, tool_use): chat_template.jinja wins over tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template if {"name", "template"} <= set(entry)}
    return {}


class ChatTemplate:
    """One template, compiled on first use, with the names that published templates rely on (see `_environment`)."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def _compiled(self) -> Any:
        import jinja2

        try:
            return _environment().from_string(self.text)
        except jinja2.TemplateError as error:
            raise AskError(f"the checkpoint's chat template is broken: {error}", field="tokenizer") from None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself: whatever else it is given changes nothing."""
        from jinja2 import TemplateError, meta

        try:
            return frozenset(meta.find_undeclared_variables(_environment().parse(self.text)))
        except TemplateError as error:
            raise AskError(f"the checkpoint's chat template is broken: {error}", field="tokenizer") from None

    def render(self, messages: list[dict[str, Any]], continue_final_message: bool, variables: dict[str, Any]) -> str:
        """The conversation as text; with `continue_final_message` it ends where the last message's content ends."""
        import jinja2

        try:
            text = self._compiled.render(**{"tools": None, "documents": None, **variables, "messages": messages})
        except jinja2.TemplateError as error:
            raise AskError(f"refused by the chat template: {error}", field="messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            problem = f"the chat template cannot render them: {type(error).__name__}: {error}"
            raise AskError(problem, field="messages", hint="check each message's role and content") from None
        return _cut_after(text, messages) if continue_final_message else text


def _cut_after(text: str, messages: list[dict[str, Any]]) -> str:
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str) or not content.strip():
        raise AskError("the last message has no text to continue", field="continue_final_message")
    start = text.rfind(content.strip())
    if start < 0:
        raise AskError("the chat template changes the last message's text", field="continue_final_message")
    whole = content.lstrip()
    return text[:start] + (whole if text.startswith(whole, start) else content.strip())


def _environment() -> Any:
    """Trimmed blocks, `tojson` without HTML escapes, raise_exception, strftime_now, loop controls, `generation`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's part for training; here it is plain text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
