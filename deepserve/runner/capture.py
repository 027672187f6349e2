"""CUDA graphs: what a function launches is recorded, to be launched again in one call, however many kernels it has."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from deepserve.log import get_logger

log = get_logger(__name__)
Replay = Callable[[], None]


class GraphRecorder(Protocol):
    """What records. A recording reads and writes the memory that its function read and wrote when it was recorded."""

    def record(self, function: Callable[[], Any]) -> tuple[Replay, Any]:
        """Calls and records it. The replay computes anew what is in the result (tensors, or tuples of them)."""
        ...

    def bare(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor once more, where possible without keeping its memory from recordings to come."""
        ...


class CudaRecorder:
    """All recordings share one pool of memory: what nobody holds when a recording begins may become part of it.

    So whoever replays some in the order in which they were recorded finds in each what the ones before it left, as long
    as the results that were still to be read were held while the next were recorded. Between such a line of replays
    and another nothing is kept but tensors that are held.
    """

    def __init__(self, device: torch.device):
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, function: Callable[[], Any]) -> tuple[Replay, Any]:
        """See GraphRecorder. The first call compiles kernels and asks for workspaces, which a recording cannot."""
        function()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # Not torch.cuda.graph: it waits for the device and empties the cache each time, and there are hundreds.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                result = function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph.replay()
        return graph.replay, result

    def bare(self, tensor: torch.Tensor) -> torch.Tensor:
        """See GraphRecorder: valid as long as this recorder's recordings are."""
        return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)


class _Memory:
    """Where a tensor lies and how, in the protocol by which torch takes memory that it does not own."""

    def __init__(self, tensor: torch.Tensor):
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<i{size}" if size > 1 else "|i1",  # the protocol knows no bfloat16
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


@contextmanager
def capturing(sizes: str, estimated_bytes: int) -> Iterator[None]:
    """Around all recordings of a GPU: no garbage is collected in them, and what they took is told and compared."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()  # a collection might free memory of the device, which ends a recording
    start, free = time.perf_counter(), _free_bytes()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
    tell(sizes, time.perf_counter() - start, free - _free_bytes(), estimated_bytes)


def tell(sizes: str, seconds: float, num_bytes: int, estimated_bytes: int) -> None:
    """Logs what the recordings took."""
    took, estimated = max(num_bytes, 0) / 2**30, estimated_bytes / 2**30
    text = "Graph capturing finished in %.1f s, took %.2f GiB (estimated %.2f GiB), for %s"
    log.info(text, seconds, took, estimated, sizes)
    if num_bytes > estimated_bytes:
        why = "recorded steps took %.2f GiB more than the plan counted: lower gpu_memory_utilization if memory is short"
        log.warning(why, took - estimated)


def _free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
