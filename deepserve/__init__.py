"""DeepServe serves the DeepSeek family. The public names are `LLM`, `SamplingParams` and `Config`, and nothing else.

They are loaded on first use, so that `import deepserve` (and with it the command line's --help) imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepserve.config import Config
    from deepserve.llm import LLM
    from deepserve.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Config", "SamplingParams"]

_HOMES = {"LLM": "deepserve.llm", "SamplingParams": "deepserve.sampling_params", "Config": "deepserve.config"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"deepserve has no public name {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
