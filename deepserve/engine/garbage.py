"""Python's garbage, collected between steps and not in them: a collection in a step is a step that takes longer."""

from __future__ import annotations

import gc
from types import TracebackType

YOUNG = 10_000  # objects that were made and not freed since the last sweep: about a millisecond's work
SWEEPS = 20  # of young objects before one of all


class Garbage:
    """While it is entered nothing is collected by itself, and nothing that was there before is looked at again.

    Whoever runs steps calls `sweep` after each: what may lie about uncollected is bounded by the number of objects.
    """

    def __init__(self) -> None:
        self._was_enabled = False
        self._num_sweeps = 0
        self._is_clean = True

    def __enter__(self) -> Garbage:
        self._was_enabled = gc.isenabled()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def sweep(self, idle: bool = False) -> None:
        """Collects young objects where there are many; with `idle`, once after work, everything."""
        if idle:
            if not self._is_clean:
                gc.collect()
                self._num_sweeps, self._is_clean = 0, True
            return
        self._is_clean = False
        if gc.get_count()[0] >= YOUNG:
            self._num_sweeps = (self._num_sweeps + 1) % SWEEPS
            gc.collect(1 if self._num_sweeps else 2)
