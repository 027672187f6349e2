"""Heuristics that memory-bound Triton launchers share: how much of a row, and how many rows, one program takes."""

from __future__ import annotations

ELEMENTS_A_THREAD = 16  # of 16 bits: two loads of 16 bytes, enough in flight to hide memory's latency
SMALLEST_TILE = 1024  # elements below which a program costs more to start than to run
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
