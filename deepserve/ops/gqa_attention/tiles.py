"""The tiles that decode and prefill can have."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deepserve.ops.tiles import Space, Tile, fits

if TYPE_CHECKING:
    from deepserve.ops.launch import Chip

SHAPE = ("heads", "kv_heads", "dim", "element_bytes")


def _decode(chip: Chip, key: Mapping[str, int]) -> list[Tile]:
    shapes = itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4))
    return [tile for tile in shapes if fits(chip, tile[2], tile[0] * 2 * key["dim"] * key["element_bytes"])]


def _prefill(chip: Chip, key: Mapping[str, int]) -> list[Tile]:
    shapes = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    return [tile for tile in shapes if fits(chip, tile[3], tile[1] * 2 * key["dim"] * key["element_bytes"])]


# A CUDA graph is recorded once for contexts of any length, so a decode tile may not depend on it.
DECODE = Space("gqa_attention", "decode", SHAPE, ("requests",), ("keys", "warps", "stages"), _decode)
PREFILL = Space("gqa_attention", "prefill", SHAPE, ("queries",), ("queries", "keys", "warps", "stages"), _prefill)
