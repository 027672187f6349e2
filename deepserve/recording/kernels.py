"""Counts kernels that are compiled while requests are served: each stops a step for a while, and none should be."""

from __future__ import annotations

from typing import Any

from deepserve.log import get_logger

log = get_logger(__name__)


class CompiledKernels:
    """From `start` on counters[name] counts Triton kernels that are compiled, or loaded from its cache on disk.

    Triton tells one listener in a process, so the engine that was built last counts; none does while one is built.
    """

    name = "kernels_compiled_while_serving"

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._listen(None)

    def start(self, counters: dict[str, int]) -> None:
        """Everything that the engine needs has been compiled."""
        self._counters = counters
        counters[self.name] = 0
        self._listen(self._note)

    def _listen(self, listener: Any) -> None:
        import triton

        triton.knobs.runtime.jit_post_compile_hook = listener

    def _note(self, *_: Any, **told: Any) -> None:
        self._counters[self.name] += 1
        kernel = getattr(told.get("fn"), "name", "a kernel")
        log.warning("%s was compiled while serving: no step before was like this one (%s)", kernel, told.get("repr"))
