"""Experts in Triton: tokens sorted by expert with no word to the host, two grouped products, a weighted sum.

Experts are in use or not from step to step; the grid is as large as it can get, and programs with nothing to do end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import Chip, chip, next_power_of_two, num_warps
from deepserve.ops.moe_experts.tiles import DOWN, GATE_UP
from deepserve.ops.op import Kernel

SORTED_ROWS = 64  # tokens of one sorting program


@triton.jit
def _chosen(ids, row, num_tokens, TOP_K: tl.constexpr, EXPERTS_BLOCK: tl.constexpr):
    """int32 [rows, EXPERTS_BLOCK]: k + 1 where the row's k-th choice is that expert, else 0."""
    expert = tl.arange(0, EXPERTS_BLOCK)[None, :]
    chosen = tl.zeros((row.shape[0], EXPERTS_BLOCK), tl.int32)
    for k in tl.static_range(TOP_K):
        choice = tl.load(ids + row.to(tl.int64) * TOP_K + k, row < num_tokens, -1)
        chosen = tl.where(choice[:, None] == expert, k + 1, chosen)
    return chosen


@triton.jit(do_not_specialize=["num_choices"])
def _moe_count_kernel(
    ids, counts, num_choices, CHOICES: tl.constexpr, BLOCK: tl.constexpr, EXPERTS_BLOCK: tl.constexpr
):
    """counts int32 [programs, EXPERTS_BLOCK]: how many of this program's CHOICES of the [T * K] go to each expert."""
    program, place = tl.program_id(0), tl.arange(0, BLOCK)
    mask = (place < CHOICES) & (program * CHOICES + place < num_choices)
    expert = tl.load(ids + program * CHOICES + place, mask, 0).to(tl.int32)
    count = tl.histogram(expert, EXPERTS_BLOCK, mask)
    tl.store(counts + program * EXPERTS_BLOCK + tl.arange(0, EXPERTS_BLOCK), count)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _moe_sort_kernel(
    ids,  # [T, TOP_K]
    counts,  # of _moe_count_kernel; None where this is the only program
    rows,  # int32 [T * (TOP_K + SHARED)]: the flat index t * TOP_K + k of each place, sorted by expert
    tiles,  # int32 [num_tiles, 4]: expert (-1: none), first place, end of the expert's places
    num_tokens,
    num_tiles,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,  # experts after the routed ones that every token goes to
    EXPERTS_BLOCK: tl.constexpr,  # power of two that covers EXPERTS + SHARED
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # places of one tile of the products
    COUNTED: tl.constexpr,  # programs of which counts are read at a time
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    expert = tl.arange(0, EXPERTS_BLOCK)
    row = program * ROWS + tl.arange(0, ROWS)
    chosen = _chosen(ids, row, num_tokens, TOP_K, EXPERTS_BLOCK)
    is_chosen = (chosen > 0).to(tl.int32)
    own = tl.sum(is_chosen, 0)
    before = tl.zeros((EXPERTS_BLOCK,), tl.int32)
    total = own
    if counts is not None:
        total = tl.zeros((EXPERTS_BLOCK,), tl.int32)
        for start in range(0, num_programs, COUNTED):
            other = start + tl.arange(0, COUNTED)[:, None]
            count = tl.load(counts + other * EXPERTS_BLOCK + expert[None, :], other < num_programs, 0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(other < program, count, 0), 0)
    total = tl.where((expert >= EXPERTS) & (expert < EXPERTS + SHARED), num_tokens, total)
    end = tl.cumsum(total, 0)
    begin = end - total
    place = (begin + before)[None, :] + tl.cumsum(is_chosen, 0) - is_chosen
    tl.store(rows + place, row[:, None] * TOP_K + chosen - 1, chosen > 0)
    for shared in tl.static_range(SHARED):
        place = num_tokens * (TOP_K + shared) + row
        tl.store(rows + place, place, row < num_tokens)

    tile_end = tl.cumsum((total + TILE - 1) // TILE, 0)
    tile_begin = tile_end - (total + TILE - 1) // TILE
    for start in range(program * 64, num_tiles, num_programs * 64):
        tile = start + tl.arange(0, 64)
        inside = (tile[:, None] >= tile_begin[None, :]) & (tile[:, None] < tile_end[None, :])
        which = tl.sum(tl.where(inside, expert[None, :] + 1, 0), 1) - 1
        first = tl.sum(tl.where(inside, begin[None, :] + (tile[:, None] - tile_begin[None, :]) * TILE, 0), 1)
        last = tl.sum(tl.where(inside, end[None, :], 0), 1)
        tl.store(tiles + tile * 4, which, tile < num_tiles)
        tl.store(tiles + tile * 4 + 1, first, tile < num_tiles)
        tl.store(tiles + tile * 4 + 2, last, tile < num_tiles)


@triton.jit
def _tile(tiles, tile, TOP_K: tl.constexpr, SORTED: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first place, end of the places) of a tile."""
    if SORTED:
        expert = tl.load(tiles + tile * 4).to(tl.int64)
        first, last = tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    else:
        chosen = tl.load(tiles + tile, tile < TOP_K, 0)
        expert = tl.where(tile < TOP_K, chosen, (EXPERTS - TOP_K + tile).to(tl.int64))
        first, last = tile, tile + 1
    return expert, first, last


@triton.jit(do_not_specialize=["num_tokens"])
def _moe_gate_up_kernel(
    x,  # [T, HIDDEN] at row stride x_stride
    weight,  # [EXPERTS, 2 * WIDTH, HIDDEN]
    shared_weight,  # [2 * SHARED * WIDTH, HIDDEN], gates first, or None
    hidden,  # [places, WIDTH]
    rows,
    tiles,  # of _moe_sort_kernel, or of a single token its ids: then every place is a tile
    num_tokens,
    x_stride,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LIMIT: tl.constexpr,  # gate and up are clamped to it, unless None
):
    tile = tl.program_id(0) // ((WIDTH + N - 1) // N)
    expert, first, last = _tile(tiles, tile, TOP_K, SORTED, EXPERTS)
    if expert < 0:
        return
    place = first + tl.arange(0, M)
    is_row = place < last
    flat = tl.load(rows + place, is_row, 0) if SORTED else place
    token = tl.where(flat < num_tokens * TOP_K, flat // TOP_K, (flat - num_tokens * TOP_K) % num_tokens)
    column = tl.program_id(0) % ((WIDTH + N - 1) // N) * N + tl.arange(0, N)
    is_column = column < WIDTH
    gates = weight + expert * (2 * WIDTH * HIDDEN)
    up = WIDTH * HIDDEN
    if SHARED > 0:
        if expert >= EXPERTS:
            gates = shared_weight + (expert - EXPERTS) * (WIDTH * HIDDEN)
            up = SHARED * WIDTH * HIDDEN
    channel = tl.arange(0, K)
    left = x + token.to(tl.int64)[:, None] * x_stride + channel[None, :]
    right = gates + column[None, :] * HIDDEN + channel[:, None]
    gate_sum = tl.zeros((M, N), tl.float32)
    up_sum = tl.zeros((M, N), tl.float32)
    for start in range(0, HIDDEN, K):
        inside = start + channel < HIDDEN
        a = tl.load(left + start, is_row[:, None] & inside[None, :], 0.0)
        mask = inside[:, None] & is_column[None, :]
        gate_sum = tl.dot(a, tl.load(right + start, mask, 0.0), gate_sum, input_precision="ieee")
        up_sum = tl.dot(a, tl.load(right + up + start, mask, 0.0), up_sum, input_precision="ieee")
    if LIMIT is not None:
        gate_sum = tl.minimum(gate_sum, LIMIT)
        up_sum = tl.minimum(tl.maximum(up_sum, -LIMIT), LIMIT)
    value = gate_sum * tl.sigmoid(gate_sum) * up_sum
    out = hidden + place.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out, value.to(hidden.dtype.element_ty), is_row[:, None] & is_column[None, :])


@triton.jit
def _moe_down_kernel(
    hidden,  # [places, WIDTH]
    weight,  # [EXPERTS, HIDDEN, WIDTH]
    shared_weight,  # [HIDDEN, SHARED * WIDTH] or None
    out,  # [T * (TOP_K + SHARED), HIDDEN], by flat index
    rows,
    tiles,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0) // ((HIDDEN + N - 1) // N)
    expert, first, last = _tile(tiles, tile, TOP_K, SORTED, EXPERTS)
    if expert < 0:
        return
    place = first + tl.arange(0, M)
    is_row = place < last
    column = tl.program_id(0) % ((HIDDEN + N - 1) // N) * N + tl.arange(0, N)
    is_column = column < HIDDEN
    matrix = weight + expert * (HIDDEN * WIDTH)
    stride = WIDTH
    if SHARED > 0:
        if expert >= EXPERTS:
            matrix = shared_weight + (expert - EXPERTS) * WIDTH
            stride = SHARED * WIDTH
    channel = tl.arange(0, K)
    left = hidden + place.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    right = matrix + column[None, :] * stride + channel[:, None]
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, WIDTH, K):
        inside = start + channel < WIDTH
        a = tl.load(left + start, is_row[:, None] & inside[None, :], 0.0)
        b = tl.load(right + start, inside[:, None] & is_column[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    flat = tl.load(rows + place, is_row, 0) if SORTED else place
    target = out + flat.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), is_row[:, None] & is_column[None, :])


@triton.jit
def _moe_sum_kernel(y, weights, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(y + (token * TOP_K + k) * HIDDEN + channel, channel < HIDDEN, 0.0).to(tl.float32)
        total += row * tl.load(weights + token * TOP_K + k)
    tl.store(out + token * HIDDEN + channel, total.to(out.dtype.element_ty), channel < HIDDEN)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Shapes of the two products: rows, columns, channels, warps and stages of each."""

    rows: int
    gate_up: tuple[int, int, int, int]  # columns (of gate and of up), channels, warps, stages
    down: tuple[int, int, int, int]


def _choose(rows_an_expert: float, is_amd: bool, wide: bool) -> _Tiles:
    """Few rows an expert (weights stream by once), a ramp, and many (matrix units are busy)."""
    if wide:
        return _Tiles(16, (32, 32, 4, 2), (32, 32, 4, 2))
    stages = 2 if is_amd else 4
    few_stages = min(stages, 3)
    if rows_an_expert <= 8:
        return _Tiles(16, (32, 128, 4, stages), (64, 128, 4, stages))
    if rows_an_expert <= 64:
        return _Tiles(64, (32, 128, 4, few_stages), (64, 128, 4, few_stages))
    return _Tiles(128, (128, 64, 8, stages), (128 if is_amd else 256, 64, 8, stages))


def _tuned(found: Chip, shape: _Tiles, **key: int) -> _Tiles:
    """`shape`, or what the tables say for so many `rows` of each of the `experts` in use."""
    rows, *gate_up = GATE_UP.choose(found, (shape.rows, *shape.gate_up), **key)
    return _Tiles(rows, tuple(gate_up), DOWN.choose(found, shape.down, tile_rows=rows, **key))


def _sort(
    ids: torch.Tensor, num_experts: int, num_shared: int, tile_rows: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(rows, tiles, number of tiles) as _moe_sort_kernel makes them."""
    (num_tokens, top_k), device = ids.shape, ids.device
    places = num_tokens * (top_k + num_shared)
    used = min(num_tokens * top_k, num_experts) + num_shared
    num_tiles = used + (places - used) // tile_rows
    rows = torch.empty(places, dtype=torch.int32, device=device)
    tiles = torch.empty((num_tiles, 4), dtype=torch.int32, device=device)
    experts_block, programs = next_power_of_two(num_experts + num_shared), triton.cdiv(num_tokens, SORTED_ROWS)
    sorted_rows = min(SORTED_ROWS, next_power_of_two(num_tokens))
    counts = None
    if programs > 1:
        counts = torch.empty((programs, experts_block), dtype=torch.int32, device=device)
        choices = sorted_rows * top_k
        _moe_count_kernel[(programs,)](
            ids, counts, ids.numel(), choices, next_power_of_two(choices), experts_block, num_warps=4
        )
    _moe_sort_kernel[(programs,)](
        ids, counts, rows, tiles, num_tokens, num_tiles, top_k, num_experts, num_shared, experts_block, sorted_rows,
        tile_rows, 16, num_warps=8,
    )  # fmt: skip
    return rows, tiles, num_tiles


def expert_rows(
    x: torch.Tensor,
    matrices: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    limit: float | None,
    shared: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """[T * (K + S), H]: the unweighted outputs of each token's K experts, then those of all tokens' S shared ones.

    matrices [E, 2I, H] and [E, H, I]; shared [2SI, H] and [H, SI].
    """
    (num_tokens, top_k), (num_experts, hidden_size, width) = ids.shape, matrices[1].shape
    num_shared = shared[1].shape[1] // width if shared else 0
    found, wide = chip(x.device), x.element_size() > 2
    used = min(num_tokens * top_k, num_experts)
    shape = _tuned(
        found, _choose(num_tokens * top_k / num_experts, found.is_amd, wide), rows=-(-num_tokens * top_k // used),
        experts=used, hidden=hidden_size, width=width, element_bytes=x.element_size(),
    )  # fmt: skip
    places = num_tokens * (top_k + num_shared)
    rows, tiles, num_tiles = _sort(ids, num_experts, num_shared, shape.rows) if num_tokens > 1 else (ids, ids, places)
    hidden = torch.empty((places, width), dtype=x.dtype, device=x.device)
    columns, channels, warps, stages = shape.gate_up
    _moe_gate_up_kernel[(num_tiles * triton.cdiv(width, columns),)](
        x, matrices[0], shared[0] if shared else None, hidden, rows, tiles, num_tokens, x.stride(0), top_k,
        num_tokens > 1, num_experts, num_shared, hidden_size, width, shape.rows, columns, channels, limit,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = torch.empty((places, hidden_size), dtype=x.dtype, device=x.device)
    columns, channels, warps, stages = shape.down
    _moe_down_kernel[(num_tiles * triton.cdiv(hidden_size, columns),)](
        hidden, matrices[1], shared[1] if shared else None, out, rows, tiles, top_k, num_tokens > 1, num_experts,
        num_shared, hidden_size, width, shape.rows, columns, channels, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def moe_experts(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    limit: float | None,
) -> torch.Tensor:
    """See spec.py."""
    (num_tokens, hidden_size), top_k = x.shape, ids.shape[1]
    y = expert_rows(x, (w_gate_up, w_down), ids, limit)
    out = torch.empty((num_tokens, hidden_size), dtype=x.dtype, device=x.device)
    block = min(next_power_of_two(hidden_size), 1024)
    _moe_sum_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        y, weights, out, top_k, hidden_size, block, num_warps=num_warps(block)
    )
    return out


KERNEL = Kernel("moe_experts", "triton", moe_experts)
