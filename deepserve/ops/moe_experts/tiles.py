"""The tiles that the two grouped products can have."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from deepserve.ops.tiles import Space, Tile, fits, round_up

if TYPE_CHECKING:
    from deepserve.ops.launch import Chip

SHAPE = ("hidden", "width", "element_bytes")
LIVE = ("rows", "experts")  # rows of each expert in use, and how many are
PRODUCT = ("columns", "channels", "warps", "stages", "described")
LANES = 32  # of a warp: an AMD wavefront has 64, and then a lane has half as many sums
MAX_SUMS = 128  # fp32 that a lane keeps in registers


def _product(chip: Chip, rows: Iterable[int], most: tuple[int, int], size: int, sums: int) -> list[Tile]:
    """(rows, *PRODUCT) for a left operand and `sums` right ones of at most (columns, channels), elements of `size`
    bytes: every lane has some sums and not too many, and what is loaded ahead fits into shared memory.
    """
    sides = (32, 64, 128, 256)
    stages, described = (range(1, 4), (0,)) if chip.is_amd else (range(1, 6), (0, 1))
    return [
        (m, n, k, warps, stages, by_engine)
        for m, n, k, warps, stages, by_engine in itertools.product(rows, sides, sides, (4, 8), stages, described)
        if n <= round_up(most[0]) and k <= round_up(most[1])
        if 4 <= m * n / (warps * LANES) <= MAX_SUMS / sums and fits(chip, stages, (m + sums * n) * k * size)
    ]


def _gate_up(chip: Chip, key: Mapping[str, int]) -> list[Tile]:
    most = max(4 * key["rows"], 16)
    rows = [rows for rows in (16, 32, 64, 128) if min(key["rows"] // 8, 64) <= rows <= most]
    return _product(chip, rows, (key["width"], key["hidden"]), key["element_bytes"], 2)


def _down(chip: Chip, key: Mapping[str, int]) -> list[Tile]:
    tiles = _product(chip, [key["tile_rows"]], (key["hidden"], key["width"]), key["element_bytes"], 1)
    return [tile[1:] for tile in tiles]


GATE_UP = Space("moe_experts", "gate_up", SHAPE, LIVE, ("rows", *PRODUCT), _gate_up)
# Tokens are sorted into tiles of as many rows as gate_up has: the second product takes them as they are.
DOWN = Space("moe_experts", "down", (*SHAPE, "tile_rows"), LIVE, PRODUCT, _down)
