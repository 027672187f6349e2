"""Launches that overlap: a kernel starts while the one before it ends (NVIDIA's programmatic dependent launch).

A launcher passes `**overlap(device)` to its kernels; a kernel calls `wait` before it touches anything that another
kernel wrote or reads, and may load weights before. Every program of such a kernel must wait, or the kernel after it
could overtake the one before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from deepserve.ops.launch import overlap

__all__ = ("overlap", "wait")


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Blocks until the kernel before has ended and all it wrote is visible; then lets the next one be launched."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
