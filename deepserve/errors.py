"""The one error type that a user sees: what is wrong, where, the limit, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AskError(ValueError):
    """A request, flag, file or combination that cannot be honoured.

    `field` names what was asked (a flag, a request field, a file, a tensor), `hint` says what would work.
    The command line turns it into exit code 2, the server into HTTP 400 (or `status`). `code` is a stable word for
    clients that look at errors by program, such as context_length_exceeded.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        hint: str | None = None,
        status: int = 400,
        code: str | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint
        self.status = status
        self.code = code

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        hint = f"\nhint: {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelled name: the closest known one, or all of them where none is close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
