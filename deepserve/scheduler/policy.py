"""Who goes first. A policy ranks each request at arrival, for life: ranks order waiting, budget and preemption."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from deepserve.request import Request


def fcfs(_request: Request, arrival_idx: int) -> tuple[int, int]:
    """First come, first served."""
    return (0, arrival_idx)


def priority(request: Request, arrival_idx: int) -> tuple[int, int]:
    """A smaller `priority` goes first; equals by arrival."""
    return (request.priority, arrival_idx)


POLICIES: dict[str, Callable[[Request, int], tuple[int, int]]] = {"fcfs": fcfs, "priority": priority}


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


class RankedList:
    """Requests in the order of their ranks. Since ranks never change, a preempted request gets its old place back."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, idx: int) -> Request:
        return self._requests[idx]

    def add(self, request: Request) -> None:
        """Puts a request in its place."""
        insort(self._requests, request, key=_rank)

    def pop(self, idx: int = -1) -> Request:
        """Takes out the request at `idx`, by default the last in rank."""
        return self._requests.pop(idx)

    def remove(self, request: Request) -> None:
        """Takes out this request; ValueError if it is not here."""
        idx = bisect_left(self._requests, request.rank, key=_rank)
        if idx == len(self._requests) or self._requests[idx] is not request:
            raise ValueError(f"request {request.request_id} is not in this list")
        del self._requests[idx]
