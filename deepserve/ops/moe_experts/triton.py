"""Experts in Triton: which rows are whose is found with no word to the host, two grouped products, a weighted sum.

Few choices are looked through by the products' own programs; many are sorted by expert first. Experts are in use or not
from step to step: the grid is as large as it can get, and programs with nothing to do end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from deepserve.ops.launch import chip, next_power_of_two, num_warps
from deepserve.ops.moe_experts.tiles import DOWN, GATE_UP
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

SORTED_ROWS = 32  # tokens of one sorting program
MAX_CHOICES = 512  # of a step without sorting
CHOICES_AT_ONCE = 2048  # choices times rows that a program compares in one go: more would fill its registers
EACH, BY_CHOICE, BY_EXPERT, SORTED = range(4)  # what a program's tile is: see _tile_of


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
    ids,
    counts,
    num_choices,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """counts int32 [programs, EXPERTS_BLOCK]: how many of this program's CHOICES of the [T * K] go to each expert."""
    wait(OVERLAP)
    program, place = tl.program_id(0), tl.arange(0, BLOCK)
    mask = (place < CHOICES) & (program * CHOICES + place < num_choices)
    expert = tl.load(ids + program * CHOICES + place, mask, 0).to(tl.int32)
    count = tl.histogram(expert, EXPERTS_BLOCK, mask)
    tl.store(counts + program * EXPERTS_BLOCK + tl.arange(0, EXPERTS_BLOCK), count)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _moe_sort_kernel(
    ids,  # [T, TOP_K]
    counts,  # of _moe_count_kernel; None where this is the only program
    rows,  # int32 [T * TOP_K]: the flat index t * TOP_K + k of each place, sorted by expert
    tiles,  # int32 [num_tiles, 4]: expert (-1: none), first place, end of the expert's places
    num_tokens,
    num_tiles,
    TOP_K: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,  # power of two that covers the experts
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # places of one tile of the products
    COUNTED: tl.constexpr,  # programs of which counts are read at a time
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
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
    end = tl.cumsum(total, 0)
    begin = end - total
    place = (begin + before)[None, :] + tl.cumsum(is_chosen, 0) - is_chosen
    tl.store(rows + place, row[:, None] * TOP_K + chosen - 1, chosen > 0)

    tile_end = tl.cumsum((total + TILE - 1) // TILE, 0)
    tile_begin = tile_end - (total + TILE - 1) // TILE
    for start in range(program * 32, num_tiles, num_programs * 32):
        tile = start + tl.arange(0, 32)
        inside = (tile[:, None] >= tile_begin[None, :]) & (tile[:, None] < tile_end[None, :])
        which = tl.sum(tl.where(inside, expert[None, :] + 1, 0), 1) - 1
        first = tl.sum(tl.where(inside, begin[None, :] + (tile[:, None] - tile_begin[None, :]) * TILE, 0), 1)
        last = tl.sum(tl.where(inside, end[None, :], 0), 1)
        tl.store(tiles + tile * 4, which, tile < num_tiles)
        tl.store(tiles + tile * 4 + 1, first, tile < num_tiles)
        tl.store(tiles + tile * 4 + 2, last, tile < num_tiles)


@triton.jit
def _tile_of(
    ids, tiles, slot, num_tokens, chunk,
    MODE: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, SHARED: tl.constexpr, M: tl.constexpr,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """(expert, or -1; flat index, hidden row and whether it is one of each of M rows; rows of the expert in all).

    A flat index below T * TOP_K is token * TOP_K + k, then come the shared experts, T each. EACH (0): a token's slots
    are its choices and the shared experts. BY_CHOICE (1): a slot is a choice, if it is the first of its expert.
    BY_EXPERT (2): it is an expert. There, `chunk` rows of the expert come before. SORTED (3): a slot is a tile of
    _moe_sort_kernel.
    """
    number = tl.arange(0, M)
    if MODE == 3:
        expert = tl.load(tiles + slot * 4).to(tl.int64)
        place = tl.load(tiles + slot * 4 + 1) + number
        is_row = place < tl.load(tiles + slot * 4 + 2)
        flat = tl.load(ids + place, is_row, 0)  # of the sorted rows
        count = M
        return expert, flat, place, is_row, count
    elif MODE == 0:
        expert = tl.load(ids + slot, slot < TOP_K, 0).to(tl.int64)
        expert = tl.where(slot < TOP_K, expert, EXPERTS - TOP_K + slot)
        flat = slot + 0 * number  # rows that are none read where one is
        return expert, flat, flat, number < 1, 1
    else:
        num_choices = num_tokens * TOP_K
        slots = EXPERTS
        expert = slot
        if MODE == 1:
            slots = num_choices
            expert = tl.load(ids + slot, slot < slots, 0).to(tl.int32)
        wanted = chunk + number
        flat = tl.zeros((M,), tl.int32)
        count = 0
        num_before = 0
        for start in range(0, num_choices, CHOICES):
            place = start + tl.arange(0, CHOICES)
            chosen = tl.load(ids + place, place < num_choices, -1).to(tl.int32)
            hit = (chosen == expert).to(tl.int32)
            rank = count + tl.cumsum(hit, 0) - hit
            found = (rank[None, :] == wanted[:, None]) & (hit[None, :] > 0)
            flat += tl.sum(tl.where(found, place[None, :], 0), 1)
            count += tl.sum(hit, 0)
            if MODE == 1:
                num_before += tl.sum(tl.where(place < slot, hit, 0), 0)
        if MODE == 1:
            count = tl.where(num_before > 0, 0, count)
        if SHARED > 0:
            if slot >= slots:
                expert = EXPERTS + slot - slots
                count = num_tokens
                flat = num_choices + (slot - slots) * num_tokens + wanted
        is_row = wanted < count
        expert = tl.where(count > 0, expert, -1)
        return expert.to(tl.int64), tl.where(is_row, flat, 0), tl.where(is_row, flat, 0), is_row, count


@triton.jit
def _is_half(tiles, slot, M: tl.constexpr):
    """Whether half of a sorted tile's M rows are enough."""
    return tl.load(tiles + slot * 4 + 2) - tl.load(tiles + slot * 4 + 1) <= M // 2


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    """Masks cost instructions even where they are all true."""
    if MASKED:
        values = tl.load(pointers, mask, 0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def gate_up_tile(
    x, weight, described, shared_weight, hidden, expert, flat, place, is_row, part, num_tokens, x_stride,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, SHARED: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Rows times N gates and the N ups beside them, as one product of 2N columns, and the activation of its sums."""
    token = flat // TOP_K
    gates = weight + expert * (2 * WIDTH * HIDDEN)
    up = WIDTH * HIDDEN
    if SHARED > 0:
        choices = num_tokens * TOP_K
        token = tl.where(flat < choices, token, (flat - choices) % num_tokens)
        if expert >= EXPERTS:
            gates = shared_weight + (expert - EXPERTS) * (WIDTH * HIDDEN)
            up = SHARED * WIDTH * HIDDEN
    CUT: tl.constexpr = HIDDEN % K != 0
    channel = tl.arange(0, K)
    left = x + token.to(tl.int64)[:, None] * x_stride + channel[None, :]
    total = tl.zeros((M, 2 * N), tl.float32)
    if described is not None:  # tiles of gates, then ups
        for start in range(0, HIDDEN, K):
            a = _load(left + start, (start + channel < HIDDEN)[None, :], CUT)
            b = described.load([(2 * expert).to(tl.int32), part * N, start])
            total = tl.dot(a, tl.reshape(b, (2 * N, K)).T, total, input_precision="ieee")
        gate, other = tl.split(tl.permute(tl.reshape(total, (M, 2, N)), (0, 2, 1)))
    else:  # gates and ups in turn: both of a channel are sums of one thread
        pair = tl.arange(0, 2 * N)
        column = part * N + pair // 2
        right = gates + (pair % 2 * up + column * HIDDEN)[None, :] + channel[:, None]
        for start in range(0, HIDDEN, K):
            inside = start + channel < HIDDEN
            a = _load(left + start, inside[None, :], CUT)
            b = _load(right + start, inside[:, None] & (column < WIDTH)[None, :], CUT or WIDTH % N != 0)
            total = tl.dot(a, b, total, input_precision="ieee")
        gate, other = tl.split(tl.reshape(total, (M, N, 2)))
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        other = tl.minimum(tl.maximum(other, -LIMIT), LIMIT)
    value = (gate * tl.sigmoid(gate) * other).to(hidden.dtype.element_ty)
    column = part * N + tl.arange(0, N)
    out = hidden + place.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out, value, is_row[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _moe_gate_up_kernel(
    x,  # [T, HIDDEN] at row stride x_stride
    weight,  # [EXPERTS, 2 * WIDTH, HIDDEN]
    described,  # the same as [EXPERTS * 2, WIDTH, HIDDEN] in tiles of [2, N, K], or None
    shared_weight,  # [2 * SHARED * WIDTH, HIDDEN], gates first, or None
    hidden,  # [T * (TOP_K + SHARED), WIDTH], by hidden row
    ids,  # [T, TOP_K], or the rows of _moe_sort_kernel
    tiles,  # of _moe_sort_kernel, or None
    num_tokens,
    x_stride,
    MODE: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    REPEATS: tl.constexpr,  # an expert may have more rows than M
    HALVES: tl.constexpr,  # an expert's last tile, where half as many rows are enough, has no more
    LIMIT: tl.constexpr,  # gate and up are clamped to it, unless None
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    slot = tl.program_id(0) // ((WIDTH + N - 1) // N)
    part = tl.program_id(0) % ((WIDTH + N - 1) // N)
    expert, flat, place, is_row, count = _tile_of(
        ids, tiles, slot, num_tokens, 0, MODE, TOP_K, EXPERTS, SHARED, M, CHOICES
    )
    if expert < 0:
        return
    if REPEATS:
        for chunk in range(0, count, M):
            _, flat, place, is_row, _ = _tile_of(
                ids, tiles, slot, num_tokens, chunk, MODE, TOP_K, EXPERTS, SHARED, M, CHOICES
            )
            gate_up_tile(
                x, weight, described, shared_weight, hidden, expert, flat, place, is_row, part, num_tokens, x_stride,
                TOP_K, EXPERTS, SHARED, HIDDEN, WIDTH, M, N, K, LIMIT,
            )  # fmt: skip
    elif HALVES and _is_half(tiles, slot, M):
        _, few_flat, few_place, is_few, _ = _tile_of(
            ids, tiles, slot, num_tokens, 0, MODE, TOP_K, EXPERTS, SHARED, M // 2, CHOICES
        )
        gate_up_tile(
            x, weight, described, shared_weight, hidden, expert, few_flat, few_place, is_few, part, num_tokens,
            x_stride, TOP_K, EXPERTS, SHARED, HIDDEN, WIDTH, M // 2, N, K, LIMIT,
        )  # fmt: skip
    else:
        gate_up_tile(
            x, weight, described, shared_weight, hidden, expert, flat, place, is_row, part, num_tokens, x_stride,
            TOP_K, EXPERTS, SHARED, HIDDEN, WIDTH, M, N, K, LIMIT,
        )  # fmt: skip


@triton.jit
def _down_tile(
    hidden, weight, described, shared_weight, out, expert, flat, place, is_row, part,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """AHEAD: the first weights are on their way before the kernel that makes `hidden` has ended."""
    matrix = weight + expert * (HIDDEN * WIDTH)
    stride = WIDTH
    if SHARED > 0:
        if expert >= EXPERTS:
            matrix = shared_weight + (expert - EXPERTS) * WIDTH
            stride = SHARED * WIDTH
    CUT: tl.constexpr = WIDTH % K != 0
    column = part * N + tl.arange(0, N)
    channel = tl.arange(0, K)
    left = hidden + place.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    total = tl.zeros((M, N), tl.float32)
    if described is not None:
        for start in range(0, WIDTH, K):
            a = tl.load(left + start, is_row[:, None] & (start + channel < WIDTH)[None, :], 0.0)
            b = described.load([(expert * HIDDEN).to(tl.int32) + part * N, start])
            total = tl.dot(a, b.T, total, input_precision="ieee")
    else:
        right = matrix + column[None, :] * stride + channel[:, None]
        if AHEAD:
            mask = (channel < WIDTH)[:, None] & (column < HIDDEN)[None, :]
            b = _load(right, mask, CUT or HIDDEN % N != 0)
            wait(OVERLAP)
            a = tl.load(left, is_row[:, None] & (channel < WIDTH)[None, :], 0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        for start in range(K if AHEAD else 0, WIDTH, K):
            inside = start + channel < WIDTH
            a = tl.load(left + start, is_row[:, None] & inside[None, :], 0.0)
            b = _load(right + start, inside[:, None] & (column < HIDDEN)[None, :], CUT or HIDDEN % N != 0)
            total = tl.dot(a, b, total, input_precision="ieee")
    target = out + flat.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), is_row[:, None] & (column < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _moe_down_kernel(
    hidden,  # of _moe_gate_up_kernel
    weight,  # [EXPERTS, HIDDEN, WIDTH]
    described,  # the same as [EXPERTS * HIDDEN, WIDTH] in tiles of [N, K], or None
    shared_weight,  # [HIDDEN, SHARED * WIDTH] or None
    out,  # [T * (TOP_K + SHARED), HIDDEN], by flat index
    ids,
    tiles,
    num_tokens,
    MODE: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    REPEATS: tl.constexpr,
    HALVES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Who is whose has stood since before _moe_gate_up_kernel, the kernel before, began: it is read without waiting."""
    AHEAD: tl.constexpr = (MODE != 3) and (not REPEATS) and (described is None)
    if not AHEAD:
        wait(OVERLAP)
    slot = tl.program_id(0) // ((HIDDEN + N - 1) // N)
    part = tl.program_id(0) % ((HIDDEN + N - 1) // N)
    expert, flat, place, is_row, count = _tile_of(
        ids, tiles, slot, num_tokens, 0, MODE, TOP_K, EXPERTS, SHARED, M, CHOICES
    )
    if expert < 0:
        if AHEAD:
            wait(OVERLAP)
        return
    if REPEATS:
        for chunk in range(0, count, M):
            _, flat, place, is_row, _ = _tile_of(
                ids, tiles, slot, num_tokens, chunk, MODE, TOP_K, EXPERTS, SHARED, M, CHOICES
            )
            _down_tile(
                hidden, weight, described, shared_weight, out, expert, flat, place, is_row, part,
                EXPERTS, SHARED, HIDDEN, WIDTH, M, N, K, AHEAD, OVERLAP,
            )  # fmt: skip
    elif HALVES and _is_half(tiles, slot, M):
        _, few_flat, few_place, is_few, _ = _tile_of(
            ids, tiles, slot, num_tokens, 0, MODE, TOP_K, EXPERTS, SHARED, M // 2, CHOICES
        )
        _down_tile(
            hidden, weight, described, shared_weight, out, expert, few_flat, few_place, is_few, part,
            EXPERTS, SHARED, HIDDEN, WIDTH, M // 2, N, K, AHEAD, OVERLAP,
        )  # fmt: skip
    else:
        _down_tile(
            hidden, weight, described, shared_weight, out, expert, flat, place, is_row, part,
            EXPERTS, SHARED, HIDDEN, WIDTH, M, N, K, AHEAD, OVERLAP,
        )  # fmt: skip


@triton.jit
def _moe_sum_kernel(
    y, weights, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(y + (token * TOP_K + k) * HIDDEN + channel, channel < HIDDEN, 0.0).to(tl.float32)
        total += row * tl.load(weights + token * TOP_K + k)
    tl.store(out + token * HIDDEN + channel, total.to(out.dtype.element_ty), channel < HIDDEN)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shapes of the two products: rows; of each columns (of gate and of up), channels, warps, stages, and whether its
    weights are described: copied to where they are multiplied by the chip's own engine for that (TMA)."""

    rows: int
    gate_up: tuple[int, ...]
    down: tuple[int, ...]


def _heuristic(num_tokens: int, rows_an_expert: float, is_amd: bool, wide: bool) -> Tiles:
    """Few rows an expert (weights stream by once), a ramp, and many (matrix units are busy)."""
    if wide:
        return Tiles(16, (32, 32, 4, 2, 0), (32, 32, 4, 2, 0))
    if is_amd:
        if rows_an_expert <= 64:
            return Tiles(16 if num_tokens <= 16 else 64, (32, 128, 4, 2, 0), (64, 128, 4, 2, 0))
        return Tiles(128, (64, 64, 8, 2, 0), (128, 64, 8, 2, 0))
    if rows_an_expert <= 12:
        return Tiles(16, (32, 128, 4, 4, 0), (64, 128, 4, 4, 0))
    if rows_an_expert <= 24:
        return Tiles(32, (64, 128, 4, 3, 0), (128, 128, 4, 3, 0))
    if rows_an_expert <= 64:
        return Tiles(64, (64, 64, 4, 4, 0), (128, 64, 4, 4, 0))
    return Tiles(128, (128, 64, 8, 4, 1), (256, 64, 8, 4, 1))


def _tiles(x: torch.Tensor, ids: torch.Tensor, num_experts: int, sizes: tuple[int, int]) -> Tiles:
    """What the heuristic says, or the tables for so many rows of each of the experts in use."""
    found, size, used = chip(x.device), x.element_size(), min(ids.numel(), num_experts)
    shape = _heuristic(len(ids), ids.numel() / num_experts, found.is_amd, size > 2)
    key = {"rows": -(-ids.numel() // used), "experts": used, "element_bytes": size}
    key |= dict(zip(("hidden", "width"), sizes))
    rows, *gate_up = GATE_UP.choose(found, (shape.rows, *shape.gate_up), **key)
    return Tiles(rows, tuple(gate_up), DOWN.choose(found, shape.down, tile_rows=rows, **key))


def _sort(ids: torch.Tensor, num_experts: int, tile_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, tiles) as _moe_sort_kernel makes them."""
    (num_tokens, top_k), device = ids.shape, ids.device
    places = num_tokens * top_k
    used = min(places, num_experts)
    num_tiles = used + (places - used) // tile_rows
    rows = torch.empty(places, dtype=torch.int32, device=device)
    tiles = torch.empty((num_tiles, 4), dtype=torch.int32, device=device)
    experts_block, programs = next_power_of_two(num_experts), triton.cdiv(num_tokens, SORTED_ROWS)
    counts = None
    if programs > 1:
        counts = torch.empty((programs, experts_block), dtype=torch.int32, device=device)
        choices = SORTED_ROWS * top_k
        _moe_count_kernel[(programs,)](
            ids, counts, ids.numel(), choices, next_power_of_two(choices), experts_block, num_warps=4, **overlap(device)
        )
    _moe_sort_kernel[(programs,)](
        ids, counts, rows, tiles, num_tokens, num_tiles, top_k, experts_block, SORTED_ROWS, tile_rows,
        max(4096 // experts_block, 1), num_warps=8, **overlap(device),
    )  # fmt: skip
    return rows, tiles


def _slots(
    ids: torch.Tensor, num_experts: int, tile_rows: int
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None, int]:
    """(constants of both products, their ids, their tiles, how many slots there are beside the shared experts')."""
    num_tokens, choices = len(ids), ids.numel()
    constants = {"CHOICES": max(CHOICES_AT_ONCE // tile_rows, 16), "REPEATS": tile_rows < num_tokens}
    if num_tokens == 1:
        return constants | {"MODE": EACH, "REPEATS": False}, ids, None, choices
    if choices <= MAX_CHOICES:
        mode = BY_CHOICE if choices < num_experts else BY_EXPERT
        return constants | {"MODE": mode}, ids, None, min(choices, num_experts)
    rows, tiles = _sort(ids, num_experts, tile_rows)
    return {"CHOICES": 16, "REPEATS": False, "MODE": SORTED}, rows, tiles, len(tiles)


def expert_rows(
    x: torch.Tensor,
    matrices: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    limit: float | None,
    shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    hidden: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """[T * (K + S), H]: the unweighted outputs of each token's K experts, then those of all tokens' S shared ones.

    matrices [E, 2I, H] and [E, H, I]; shared [2SI, H] and [H, SI], of no more than MAX_CHOICES choices. `hidden`
    [T * (K + S), I]: where what the shared experts make of their first product stands already. Without `tiles`, such as
    suit the number of rows.
    """
    (num_tokens, top_k), (num_experts, hidden_size, width) = ids.shape, matrices[1].shape
    num_shared = shared[1].shape[1] // width if shared else 0
    tiles = tiles or _tiles(x, ids, num_experts, (hidden_size, width))
    constants, rows, table, num_slots = _slots(ids, num_experts, tiles.rows)
    columns, channels, warps, stages, described = tiles.gate_up
    down_columns, down_channels, down_warps, down_stages, down_described = tiles.down
    gate_up = matrices[0].view(2 * num_experts, width, hidden_size), [2, columns, channels]
    down = matrices[1].view(-1, width), [down_columns, down_channels]
    constants |= {"TOP_K": top_k, "EXPERTS": num_experts, "HIDDEN": hidden_size, "WIDTH": width, "M": tiles.rows}
    constants["HALVES"] = table is not None and tiles.rows > 64  # fewer than 64 take no less time
    constants |= overlap(x.device)
    places = num_tokens * (top_k + num_shared)
    first_shared = 0 if hidden is not None else num_shared
    hidden = torch.empty((places, width), dtype=x.dtype, device=x.device) if hidden is None else hidden
    _moe_gate_up_kernel[((num_slots + first_shared) * triton.cdiv(width, columns),)](
        x, matrices[0], TensorDescriptor.from_tensor(*gate_up) if described and not shared else None,
        shared[0] if shared else None, hidden, rows, table, num_tokens, x.stride(0), N=columns, K=channels, LIMIT=limit,
        SHARED=first_shared, num_warps=warps, num_stages=stages, **constants,
    )  # fmt: skip
    out = torch.empty((places, hidden_size), dtype=x.dtype, device=x.device)
    _moe_down_kernel[((num_slots + num_shared) * triton.cdiv(hidden_size, down_columns),)](
        hidden, matrices[1], TensorDescriptor.from_tensor(*down) if down_described and not shared else None,
        shared[1] if shared else None, out, rows, table, num_tokens, N=down_columns, K=down_channels,
        SHARED=num_shared, num_warps=down_warps, num_stages=down_stages, **constants,
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
    return weigh_and_sum(expert_rows(x, (w_gate_up, w_down), ids, limit), weights)


def weigh_and_sum(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y [T * K, H], the experts' outputs, times weights [T, K], summed over K -> [T, H]."""
    (num_tokens, top_k), hidden_size = weights.shape, y.shape[1]
    out = torch.empty((num_tokens, hidden_size), dtype=y.dtype, device=y.device)
    block = min(next_power_of_two(hidden_size), 1024)
    _moe_sum_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        y, weights, out, top_k, hidden_size, block, num_warps=num_warps(block), **overlap(y.device)
    )
    return out


KERNEL = Kernel("moe_experts", "triton", moe_experts)
