"""The JSON files of a checkpoint: one object each, or an error that names the file. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepserve.errors import AskError


def read_object(file: Path, field: str) -> dict[str, Any]:
    """The object in `file`, empty where there is no such file. AskError of `field` where it holds something else."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AskError(f"{file} is not valid JSON: {error}", field=field, hint="copy the file again") from None
    if not isinstance(found, dict):
        raise AskError(f"{file} holds a {type(found).__name__}, not an object", field=field)
    return found
