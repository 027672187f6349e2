"""Messages to a prompt text, by the checkpoint's own template."""

from __future__ import annotations

from typing import Any

from deepserve.errors import AskError
from deepserve.server.protocol import ChatBody, TokenizeBody
from deepserve.tokenizer.encode import Tokenizer

# What the template is given by the server itself; a request may not replace it.
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}


def render(tokenizer: Tokenizer, body: ChatBody | TokenizeBody) -> str:
    """The prompt of a conversation. AskError names the message or argument that cannot be rendered."""
    if not body.messages:
        raise AskError("is empty", field="messages", hint="send at least one message")
    messages = [message.as_dict(f"messages[{index}]") for index, message in enumerate(body.messages)]
    continued = bool(body.continue_final_message)
    generation = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    arguments = body.chat_template_kwargs or {}
    if taken := sorted(_RESERVED & set(arguments)):
        raise AskError("is set by a field of its own", field=f"chat_template_kwargs.{taken[0]}")
    _check_arguments(tokenizer, arguments)
    return tokenizer.render_chat(messages, generation, continued, **arguments)


def _check_arguments(tokenizer: Tokenizer, arguments: dict[str, Any]) -> None:
    """Refuses an argument that the checkpoint's template does not read: it would be dropped in silence."""
    read = {name for template in tokenizer.templates.values() for name in template.variables} - _RESERVED
    for name in arguments:
        if name not in read:
            shown = name if len(name) <= 60 else name[:60] + "..."
            hint = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
            raise AskError("the chat template does not read it", field=f"chat_template_kwargs.{shown}", hint=hint)
