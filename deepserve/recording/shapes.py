"""What ops are called with in a run: one call of each size, how many there were like it, and who the experts were.

A file of JSON lines: a head, a line a call, then the tokens of every expert by layer. `bench ops` and `tune` replay it.
"""

from __future__ import annotations

import atexit
import base64
import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deepserve.errors import AskError
from deepserve.ops.load import load_op
from deepserve.ops.op import Kernel
from deepserve.runner.batch import Batch

if TYPE_CHECKING:
    from deepserve.engine.engine import Engine
    from deepserve.runner.model_runner import ModelRunner

MAX_CALLS = 32  # kept of an op
MAX_BYTES = 32 << 20  # of all of them; calls that came too late are counted only
BATCH_FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name != "derived"]
FINITE = {"low": 0x30, "high": 0x40}  # bytes that are numbers from 0 to 2 as e4m3, fp16, bf16 and fp32 alike
MEASURED = 1 << 16  # leading elements of a tensor whose mean and deviation are taken


@dataclasses.dataclass(slots=True)
class _Call:
    line: dict[str, Any]
    count: int = 0


class ShapeRecorder:
    """Two calls are alike if their types are and their sizes round up to the same powers of two: the first is kept.

    Integers are kept as they are (block ids renumbered), floating-point tensors as shape, mean and deviation.
    Warm-up is not seen. `paged` are the caches in blocks.
    """

    def __init__(self, directory: str, head: dict[str, Any], paged: Sequence[torch.Tensor], block_size: int):
        self.path = Path(directory) / f"{head['plan']}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise AskError(f"{directory} cannot be written: {error.strerror}", field="capture_shapes") from None
        self._head = head
        self._block_size = block_size
        self._paged = {cache.untyped_storage().data_ptr() for cache in paged}
        self._calls: dict[Any, _Call | None] = {}  # None: it is not kept
        self._num_bytes = self._num_left_out = 0
        self._num_kept: dict[str, int] = {}  # by op
        self._weights: dict[int, torch.Tensor] = {}  # by the id of what a kernel packed them into
        self._experts: dict[int, torch.Tensor] = {}  # tokens of each, by the id of a layer's weights
        self._started = False
        self._remember = functools.cache(self._remembering)
        atexit.register(self.close)

    def watch(self, kernel: Kernel) -> Kernel:
        """The kernel, its calls recorded first."""
        function, parameters = kernel.function, load_op(kernel.op).parameters

        @functools.wraps(function)
        def recorded(*args: Any) -> Any:
            if self._started:
                self._record(kernel, parameters, args)
            return function(*args)

        packs = {name: self._remember(pack) for name, pack in kernel.packs.items()}
        return dataclasses.replace(kernel, function=recorded, packs=packs)

    def start(self, engine: Engine, runner: ModelRunner) -> None:
        """From here on calls are recorded, until the engine is closed."""
        self._started = True
        engine.close = functools.partial(self._close, engine.close)  # type: ignore[method-assign]

    def close(self) -> None:
        """Writes the file."""
        atexit.unregister(self.close)
        lines: list[dict[str, Any]] = [self._head | {"calls_left_out": self._num_left_out}]
        lines += [call.line | {"calls": call.count} for call in self._calls.values() if call is not None]
        lines += [{"experts": [counts.tolist() for counts in self._experts.values()]}]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _close(self, close: Callable[[], None]) -> None:
        close()
        self.close()

    def _remembering(self, pack: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def remember(weight: torch.Tensor) -> Any:
            packed = pack(weight)
            self._weights[id(packed)] = weight
            return packed

        return remember

    def _record(self, kernel: Kernel, parameters: Sequence[str], args: tuple[Any, ...]) -> None:
        given = [self._weights.get(id(value), value) for value in args]
        if "ids" in parameters:
            self._count_experts(id(args[1]), given[1].shape[0], given[parameters.index("ids")])
        key = (kernel.op, *map(_size, given))
        if key not in self._calls:
            few = self._num_kept.get(kernel.op, 0) < MAX_CALLS and self._num_bytes < MAX_BYTES
            self._calls[key] = self._first(kernel, parameters, given) if few else None
        call = self._calls[key]
        if call is None:
            self._num_left_out += 1
        else:
            call.count += 1

    def _count_experts(self, layer: int, num_experts: int, ids: torch.Tensor) -> None:
        if layer not in self._experts:
            self._experts[layer] = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
        chosen = ids.flatten().long()
        self._experts[layer].scatter_add_(0, chosen, torch.ones_like(chosen))

    def _first(self, kernel: Kernel, parameters: Sequence[str], given: list[Any]) -> _Call:
        blocks = self._blocks(parameters, given)
        told = [self._told(name, value, blocks) for name, value in zip(parameters, given)]
        line = {"op": kernel.op, "kernel": kernel.name, "args": told}
        self._num_kept[kernel.op] = self._num_kept.get(kernel.op, 0) + 1
        self._num_bytes += len(json.dumps(line))
        return _Call(line)

    def _is_paged(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._paged

    def _told(self, name: str, value: Any, blocks: np.ndarray) -> Any:
        """An argument as JSON: {"batch": fields}, {"dtype": name}, {"tensor": shape, ...} or {"value": value}."""
        if isinstance(value, Batch):
            return {"batch": {field: self._told(field, getattr(value, field), blocks) for field in BATCH_FIELDS}}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if not isinstance(value, torch.Tensor):
            return {"value": value}
        told: dict[str, Any] = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if self._is_paged(value):
            told["tensor"] = [max(len(blocks), 1), *value.shape[1:]]
            return told | (FINITE if value.dtype == torch.uint8 else {"mean": 0.0, "std": 1.0})
        if value.dtype in (torch.int64, torch.int32):
            numbers = value.cpu().numpy()
            if name == "block_table":
                numbers = np.searchsorted(blocks, numbers).astype(numbers.dtype)
            elif name == "slot_mapping":
                block, offset = np.divmod(numbers, self._block_size)
                numbers = np.searchsorted(blocks, block) * self._block_size + offset
            return told | {"values": base64.b64encode(zlib.compress(numbers.tobytes())).decode()}
        if value.dtype == torch.uint8:
            return told
        some = value.detach().reshape(-1)[:MEASURED].float()
        return told | {"mean": float(some.mean()), "std": float(some.std(correction=0))}

    def _blocks(self, parameters: Sequence[str], given: list[Any]) -> np.ndarray:
        """Ids of the blocks that a call may touch, in order: in a replay they are 0, 1, 2 ..."""
        named = dict(zip(parameters, given))
        if isinstance(batch := named.get("batch"), Batch):
            named |= {"block_table": batch.block_table, "slot_mapping": batch.slot_mapping}
        table, slots = (named.get(name, torch.empty(0)).cpu().numpy() for name in ("block_table", "slot_mapping"))
        return np.unique(np.concatenate([table.ravel(), slots.ravel() // self._block_size])).astype(np.int64)


def _size(value: Any) -> Any:
    """What is alike in calls that are alike."""
    if isinstance(value, torch.Tensor):
        return value.dtype, *(dim.bit_length() for dim in value.shape)
    if isinstance(value, Batch):
        sizes = (len(value.query_lens), value.num_single, len(value.token_ids), value.max_seq_len)
        return tuple(size.bit_length() for size in sizes)
    return value.bit_length() if isinstance(value, int) else value
