"""The tiles that decode and prefill can have."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deepserve.ops.tiles import Space, Tile, fits

if TYPE_CHECKING:
    from deepserve.ops.launch import Chip


def _decode(chip: Chip, key: Mapping[str, int]) -> list[Tile]:
    shapes = itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4))
    return [tile for tile in shapes if fits(chip, tile[2], tile[0] * key["entry"] * key["element_bytes"])]


def _prefill(chip: Chip, key: Mapping[str, int]) -> list[Tile]:
    shapes = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    key_bytes = (key["nope"] + key["rope"] + key["v"]) * key["element_bytes"]
    return [tile for tile in shapes if fits(chip, tile[3], tile[1] * key_bytes)]


# A CUDA graph is recorded once for contexts of any length, so a decode tile may not depend on it.
DECODE = Space(
    "mla_attention", "decode", ("heads", "entry", "element_bytes"), ("requests",), ("keys", "warps", "stages"), _decode
)
PREFILL = Space(
    "mla_attention",
    "prefill",
    ("heads", "nope", "rope", "v", "element_bytes"),
    ("queries",),
    ("queries", "keys", "warps", "stages"),
    _prefill,
)
