"""What Triton launchers share: how much of a row one program takes, and what the chip has that it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch

from deepserve.hardware import architecture, gpu_name

ELEMENTS_A_THREAD = 16  # of 16 bits: two loads of 16 bytes, enough in flight to hide memory's latency
SMALLEST_TILE = 1024  # elements below which a program costs more to start than to run
COPIED_VECTORS, COPY_WARPS = 256, 4  # of a program that copies rows, of as many tokens as there are in its vectors
LANES = 32  # of a warp; an AMD wavefront has 64, and then a thread takes half as much


def next_power_of_two(size: int) -> int:
    """The least power of two that is not below size (Triton's tiles are powers of two)."""
    return 1 << max(size - 1, 0).bit_length()


def num_warps(num_elements: int) -> int:
    """Warps for a tile of so many elements: 1 to 16."""
    return min(max(num_elements // (LANES * ELEMENTS_A_THREAD), 1), 16)


def row_tile(size: int) -> tuple[int, int, int]:
    """(rows, block, warps) of a program that takes whole rows of `size` elements: block covers one row."""
    block = next_power_of_two(size)
    rows = max(SMALLEST_TILE // block, 1)
    return rows, block, num_warps(rows * block)


def vector_size(size: int) -> int:
    """Elements of a row of `size` that a thread moves at once: 8, of 16 bits 16 bytes, or what divides the row."""
    return gcd(size, 8)


@dataclass(frozen=True, slots=True)
class Chip:
    """What tile shapes depend on. `shared_bytes`: the most shared memory (LDS) of one program. `gpu`: what its tuned
    tables are called, as in h100; empty where the chip is none that is here. `overlaps`: a kernel can be launched
    before the one before it has ended.
    """

    is_amd: bool
    num_multiprocessors: int
    shared_bytes: int
    gpu: str = ""
    overlaps: bool = False


CHIPS = {
    "gfx942": Chip(True, 304, 64 << 10),
    "gfx950": Chip(True, 256, 160 << 10),
    "sm_90": Chip(False, 132, 227 << 10, overlaps=True),
}
_assumed = ["sm_90"]  # where a launcher runs without a GPU: in the interpreter, or to be compiled for another machine


@contextmanager
def assuming(target: str) -> Iterator[None]:
    """While open, launchers on tensors of no GPU choose what suits `target`."""
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


def chip(device: torch.device) -> Chip:
    """The chip behind a tensor's device."""
    return _chip(device.index or 0) if device.type == "cuda" else CHIPS[_assumed[-1]]


@cache
def _chip(index: int) -> Chip:
    found: Any = torch.cuda.get_device_properties(index)  # torch's stubs lack half of it
    is_amd = torch.version.hip is not None
    arch = architecture(found, is_amd)
    shared = CHIPS[arch].shared_bytes if is_amd else found.shared_memory_per_block_optin
    overlaps = not is_amd and found.major >= 9
    return Chip(is_amd, found.multi_processor_count, shared, gpu_name(found.name, arch), overlaps)


@dataclass(slots=True)
class Overlap:
    """Whether launches overlap where the chip can, which an engine says as it is built, and how many did."""

    on: bool = True
    count: int = 0


OVERLAP = Overlap()


def overlap(device: torch.device) -> dict[str, Any]:
    """The launch options, and the constant OVERLAP, of a kernel on this device (meta: of the chip assumed)."""
    if device.type == "cpu" or not OVERLAP.on or not chip(device).overlaps:
        return {"OVERLAP": False}
    OVERLAP.count += 1
    return {"OVERLAP": True, "launch_pdl": True}
