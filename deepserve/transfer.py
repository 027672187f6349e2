"""Between host and device with nobody waiting: copies are queued behind what the device has to do already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor there; it may be changed or dropped at once."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def send_all(device: torch.device, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """The arrays as tensors there, sent in a single copy; they may be changed or dropped at once."""
    if device.type != "cuda":
        return tuple(send(np.ascontiguousarray(array), device) for array in arrays)
    return unpack(send(pack(arrays), device), arrays)


def pack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays' bytes one after the other, each from a multiple of 16 on: kernels are compiled for that alignment,
    and for no other while serving.
    """
    packed = np.zeros(sum(map(_padded, arrays)), np.uint8)
    start = 0
    for array in arrays:
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += _padded(array)
    return packed


def unpack(packed: torch.Tensor, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
    """What `pack` made of these arrays, as tensors like them."""
    parts = packed.split([_padded(array) for array in arrays])
    return tuple(
        part[: array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for part, array in zip(parts, arrays)
    )


def _padded(array: np.ndarray) -> int:
    return -(-array.nbytes // 16) * 16


def fetch(*tensors: torch.Tensor) -> Callable[[], list[np.ndarray]]:
    """Starts copies to the host; what is returned waits for them and gives the arrays."""
    if tensors[0].device.type != "cuda":
        return lambda: [tensor.numpy() for tensor in tensors]
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[np.ndarray]:
        done.synchronize()
        return [copy.numpy() for copy in copies]

    return wait
