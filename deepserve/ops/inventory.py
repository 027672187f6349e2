"""Which ops exist, which kernels each has, and what each kernel needs. No torch: the plan reads this on any machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepserve.hardware import Hardware

ROOMS = Path(__file__).parent


def anywhere(hardware: Hardware, dtype: str) -> str | None:
    """Needs nothing."""
    return None


def a_gpu(hardware: Hardware, dtype: str) -> str | None:
    """Needs a GPU that Triton compiles for."""
    return None if hardware.kind in ("cuda", "hip") else f"needs an AMD or NVIDIA GPU, and {hardware.name} is none"


def a_cpu(hardware: Hardware, dtype: str) -> str | None:
    """Needs a CPU."""
    return None if hardware.kind == "cpu" else f"runs on a CPU only, and {hardware.name} is none"


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """One kernel of a room, described without importing it.

    `module` is the file in the room whose `KERNEL` it is (None: the op's own reference). `needs(hardware, dtype)`, the
    dtype bf16, fp16 or fp32, returns None where the kernel can run and one sentence where it cannot. `exactness` is
    against the reference: bitwise, or within the op's tolerance.
    """

    name: str
    module: str | None = None
    needs: Callable[[Hardware, str], str | None] = anywhere
    exactness: str = "bitwise"


REFERENCE = KernelInfo("reference")
# Triton's too, but slower: a row of its result is the same bits whatever other rows there are, and how many.
INVARIANT = KernelInfo("invariant", "invariant", a_gpu, "tolerance")
IN_TRITON = ("triton", "invariant")


def triton(exactness: str) -> KernelInfo:
    """The room's portable Triton kernel: one source for gfx942, gfx950 and sm_90."""
    return KernelInfo("triton", "triton", a_gpu, exactness)


@cache
def inventory() -> dict[str, tuple[KernelInfo, ...]]:
    """Every op's name and its kernels, the reference first."""
    rooms = sorted(path.parent.name for path in ROOMS.glob("*/spec.py"))
    return {room: tuple(importlib.import_module(f"deepserve.ops.{room}").KERNELS) for room in rooms}


def refusals(op_name: str, hardware: Hardware, dtype: str) -> dict[str, str | None]:
    """Kernel name -> None where it can run on `hardware`, else the sentence why not."""
    return {info.name: info.needs(hardware, dtype) for info in inventory()[op_name]}
