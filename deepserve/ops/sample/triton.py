"""sample in Triton: no row is sorted, and the logits are read once, or twice where a row has filters.

Rows are split into parts of the vocabulary. What filters keep ends at some logit; four kernels find it and draw:

1. parts: of each part the largest logit and the mass, and the largest logit of each group of neighbours (S x PARTS).
2. guess: a band of logits that most likely has the end in it, from the groups and a sample of the logits (S).
3. weigh: what is above the band in each part, exactly; what is inside is copied (S x PARTS).
4. draw: narrows the band down until one value is left, or one token; the kept mass of each part says which part has the
   drawn token, and that part is read once more (S).

A guess that was wrong shows in 4, which then narrows down over the whole row: it costs time and never another token.
Every sum has a fixed order within its row. Masses are fp64: their rounding is some 1e-16 of a row's mass, far below any
token that is ever drawn.

Tuples that the functions share: `unit`, what a mass is relative to: the best token's logit and log2(e) / temperature,
both fp64. `values`, see _weigh. `interval`, keys low and high with the end between them, and how many values and what
mass are at least low and above high: (low, high, count_low, mass_low, count_high, mass_high).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.fp32_order import INFINITY, LEAST, NAN, key_of, value_of
from deepserve.ops.launch import next_power_of_two
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

LARGEST_PART = 4096  # logits: 32 parts of 129280
FEWEST_PARTS = 4  # of a small vocabulary
COPIED = 512  # logits that 3 looks at at once: programs with few registers hide each other's waits
NEIGHBOURS = 32  # of which the largest is kept, a line of memory; one logit in as many is the sample
GROUP = tl.constexpr(NEIGHBOURS)
TILE = tl.constexpr(1024)  # logits that 2 and 4 look at at once, the same number from each part
PIVOTS = tl.constexpr(8)  # places where an interval is cut at once
BY_VALUE = tl.constexpr(7)  # the rounds that may cut into equal differences, later ones cut into equal numbers of keys;
WIDE = tl.constexpr(4096.0)  # these end exactly, and find their way where logits differ by more
FEW = tl.constexpr(32)  # groups or samples whose order a guess can do without
SLACK = tl.constexpr(4.0)  # standard deviations of a share in the sample, from the guess to each end of its band
LOG2_E = tl.constexpr(1.4426950408889634)
ALL = tl.constexpr(0x7FFFFFFF)  # a count that is never reached


@triton.jit
def _mass(logit, unit):
    """exp((logit - best) / temperature) in fp64; 0 of -inf."""
    return tl.exp2((logit.to(tl.float64) - unit[0]) * unit[1])


@triton.jit
def _unit(key, temperature, row):
    """The unit of masses relative to this key's logit, at the row's temperature."""
    return value_of(key).to(tl.float64), LOG2_E / tl.load(temperature + row).to(tl.float64)


@triton.jit
def _overview(numbers, masses, temperature, row, PARTS: tl.constexpr):
    """(Key of the row's best token, the unit of its masses, the mass of each part [PARTS])."""
    part = row * 3 * PARTS + tl.arange(0, PARTS)
    keys = tl.load(numbers + part)
    top = tl.max(keys, 0)
    unit = _unit(top, temperature, row)
    return top, unit, tl.load(masses + part) * _mass(value_of(tl.maximum(keys, LEAST)), unit)


@triton.jit
def _is_broken(top):
    """Whether a row with this largest key has no token to give."""
    return (top >= INFINITY) | (top < LEAST)


@triton.jit
def _filters(top_k, top_p, log_min_p, row, top, vocab_size):
    """(How many tokens a row keeps, 0: all; which share, 1: all; the least key)."""
    count = tl.load(top_k + row)
    count = tl.where(count < vocab_size, count, 0).to(tl.int32)
    return count, tl.load(top_p + row), tl.maximum(key_of(value_of(top) + tl.load(log_min_p + row)), LEAST)


@triton.jit
def _weigh(values, pivots, unit, WIDTH: tl.constexpr):
    """(How many values are at least each pivot, and their mass): int32, fp64 [PIVOTS].

    `values` is (source, place, room, step): lane i of TILE has `room[i]` of them (none if negative), at source +
    place[i] and every `step` from there on. WIDTH lanes go through the same part side by side.
    """
    source, place, room, step = values
    counts = tl.zeros((PIVOTS,), tl.int32)
    masses = tl.zeros((PIVOTS,), tl.float64)
    for turn in range(tl.cdiv(tl.max(room, 0), WIDTH)):
        value = tl.load(source + place + turn * step, turn * WIDTH < room, float("-inf"))
        reached = key_of(value)[None, :] >= pivots[:, None]
        counts += tl.sum(reached.to(tl.int32), 1)
        masses += tl.sum(tl.where(reached, _mass(value, unit)[None, :], 0.0), 1)
    return counts, masses


@triton.jit
def _narrow(values, interval, target, by_mass, enough, unit, WIDTH: tl.constexpr):
    """The interval, narrowed until it is one key or at most `enough` values are in it.

    The end is the largest key at least which there are `target` (fp64) values, or such a mass if by_mass; low if there
    never are. No value is above high: what is, is in the interval's count and mass alone. count_low may be too large.
    """
    low, high, count_low, mass_low, count_high, mass_high = interval
    count_low, count_high = tl.cast(count_low, tl.int32), tl.cast(count_high, tl.int32)
    mass_low, mass_high = tl.cast(mass_low, tl.float64), tl.cast(mass_high, tl.float64)
    count_beyond, mass_beyond = count_high, mass_high
    cut = tl.arange(0, PIVOTS) + 1
    rounds = 0
    while (low < high) & (count_low - count_high > enough):
        pivots = low + ((high.to(tl.int64) - low) * cut + PIVOTS) // (PIVOTS + 1)
        bottom = value_of(low).to(tl.float64)
        spread = value_of(high).to(tl.float64) - bottom
        if (rounds < BY_VALUE) & (spread < WIDE):
            value = bottom + spread * cut / (PIVOTS + 1)
            pivots = tl.minimum(tl.maximum(key_of(value.to(tl.float32)), low + 1), high).to(tl.int64)
        pivots = pivots.to(tl.int32)
        counts, masses = _weigh(values, pivots, unit, WIDTH)
        counts += count_beyond
        masses += mass_beyond
        reached = tl.where(by_mass, masses, counts.to(tl.float64)) >= target
        low = tl.maximum(low, tl.max(tl.where(reached, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(reached, high, pivots - 1), 0))
        count_low = tl.minimum(count_low, tl.min(tl.where(reached, counts, count_low), 0))
        mass_low = tl.minimum(mass_low, tl.min(tl.where(reached, masses, mass_low), 0))
        count_high = tl.maximum(count_high, tl.max(tl.where(reached, count_high, counts), 0))
        mass_high = tl.maximum(mass_high, tl.max(tl.where(reached, mass_high, masses), 0))
        rounds += 1
    return low, high, count_low, mass_low, count_high, mass_high


@triton.jit
def _sample_parts_kernel(
    logits,
    temperature,
    numbers,  # int32 [S, 3, PARTS], first: the key of each part's largest logit
    masses,  # fp64 [S, 3, PARTS], first: its mass relative to that
    leaders,  # fp32 [S, PARTS, GROUPS]: the largest logit of each group
    row_stride,
    vocab_size,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(logits + row * row_stride + column, column < vocab_size, float("-inf"))
    tl.store(leaders + row * PARTS * GROUPS + group, tl.max(value, 1))
    top = tl.max(tl.max(key_of(value), 1), 0)
    mass = _mass(value, _unit(tl.maximum(top, LEAST), temperature, row))
    place = row * 3 * PARTS + tl.program_id(1)
    tl.store(numbers + place, top)
    tl.store(masses + place, tl.sum(tl.sum(mass, 1), 0))


@triton.jit
def _sample_guess_kernel(
    logits, leaders, numbers, masses, temperature, top_k, top_p, log_min_p,
    bands,  # int32 [S, 2]: lowest and highest key of each row's band; NAN where there is nothing to look for
    row_stride, vocab_size, PARTS: tl.constexpr, GROUPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    WIDTH: tl.constexpr = TILE // PARTS
    row = tl.program_id(0).to(tl.int64)
    top, unit, mass = _overview(numbers, masses, temperature, row, PARTS)
    count, share, floor = _filters(top_k, top_p, log_min_p, row, top, vocab_size)
    known = (count == 0) & (share >= 1.0)  # the end is where min-p says
    nothing = _is_broken(top) | (known & (floor == LEAST))
    low = tl.where(nothing, NAN, tl.where(count == 1, top, floor))
    high = tl.where(nothing, NAN, tl.where(known, floor, top))
    if low == LEAST:  # then the row has no min-p, which alone leaves few enough
        by_mass = count == 0
        total = tl.sum(mass, 0)
        target = tl.where(by_mass, share * total, count.to(tl.float64))
        part, lane = tl.arange(0, TILE) // WIDTH, tl.arange(0, TILE) % WIDTH
        num_groups = tl.cdiv(vocab_size, GROUP)
        whole = (low, high, num_groups, total, 0, 0.0)
        # Where the groups' largest logits reach the target, the row does all the more.
        values = (leaders + row * PARTS * GROUPS, part * GROUPS + lane, GROUPS - lane, WIDTH)
        low, _, count_low, _, _, _ = _narrow(values, whole, target, by_mass, FEW, unit, WIDTH)
        if count_low > num_groups // 2:
            # Too much is above it: look at a sample. Below the end are small masses alone, whose sum it tells best.
            room = tl.minimum(tl.cdiv(vocab_size - part * GROUPS * GROUP, GROUP), GROUPS) - lane
            values = (logits + row * row_stride, (part * GROUPS + lane) * GROUP, room, WIDTH * GROUP)
            counts, weights = _weigh(values, tl.zeros((PIVOTS,), tl.int32) + LEAST, unit, WIDTH)
            seen = tl.maximum(tl.max(counts, 0), 1).to(tl.float64)
            total = tl.where(by_mass, total, seen * GROUP)
            reached = tl.minimum(target / total, 1.0)
            middle = tl.where(by_mass, tl.max(weights, 0), seen) - (total - target) / GROUP
            slack = SLACK * tl.sqrt(reached * (1.0 - reached) / seen) * total / GROUP
            whole = (low, high, num_groups, total, 0, 0.0)
            _, above, _, _, _, _ = _narrow(values, whole, middle - slack, by_mass, FEW, unit, WIDTH)
            low, _, _, _, _, _ = _narrow(values, whole, middle + slack, by_mass, FEW, unit, WIDTH)
            if (count == 0) | (share >= 1.0):  # else top-p ends above top-k, anywhere
                high = above
    tl.store(bands + row * 2, low)
    tl.store(bands + row * 2 + 1, high)


@triton.jit
def _sample_weigh_kernel(
    logits,
    temperature,
    bands,
    numbers,  # [S, 3, PARTS], second and third: how many logits are above the band, and inside
    masses,  # [S, 3, PARTS], second and third: their masses, relative to the row's best token
    inside,  # fp32 [S, PARTS, ROOM]: the first ROOM of those inside
    row_stride,
    vocab_size,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low, high = tl.load(bands + row * 2), tl.load(bands + row * 2 + 1)
    place = row * 3 * PARTS + part
    if tl.load(numbers + place) < low:
        for kind in tl.static_range(1, 3):
            tl.store(numbers + place + kind * PARTS, 0)
            tl.store(masses + place + kind * PARTS, 0.0)
        return
    unit = _unit(tl.max(tl.load(numbers + row * 3 * PARTS + tl.arange(0, PARTS)), 0), temperature, row)
    num_above = tl.zeros((BLOCK,), tl.int32)
    mass_above, mass_inside = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    num_inside = 0
    for start in range(0, SIZE, BLOCK):
        column = part * SIZE + start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * row_stride + column, column < vocab_size, float("-inf"))
        key, mass = key_of(value), _mass(value, unit)
        is_above, is_inside = key > high, (key >= low) & (key <= high)
        num_above += is_above.to(tl.int32)
        mass_above += tl.where(is_above, mass, 0.0)
        mass_inside += tl.where(is_inside, mass, 0.0)
        more = tl.sum(is_inside.to(tl.int32), 0)
        if more > 0:
            rank = num_inside + tl.cumsum(is_inside.to(tl.int32), 0)
            tl.store(inside + (row * PARTS + part) * ROOM + rank - 1, value, is_inside & (rank <= ROOM))
        num_inside += more
    tl.store(numbers + place + PARTS, tl.sum(num_above, 0))
    tl.store(numbers + place + 2 * PARTS, num_inside)
    tl.store(masses + place + PARTS, tl.sum(mass_above, 0))
    tl.store(masses + place + 2 * PARTS, tl.sum(mass_inside, 0))


@triton.jit
def _find_end(values, interval, count, share, total, unit, WIDTH: tl.constexpr):
    """(low, high, how many of the ties in low .. high a row keeps beside all above): top-k, then top-p of what is left.

    The ties are of one value, or it is a single one. `total`: the mass of what top-p has its share of, without top-k.
    """
    low, first_high, count_low, mass_low, first_count, first_mass = interval
    high, least, num_kept = first_high, low, count_low
    for by_mass in range(2):
        if tl.where(by_mass == 0, count > 0, share < 1.0):
            target = tl.where(by_mass == 0, count.to(tl.float64), share * total)
            interval = (low, first_high, count_low, mass_low, first_count, first_mass)
            low, high, count_low, mass_low, count_high, mass_high = _narrow(
                values, interval, target, by_mass != 0, 1, unit, WIDTH
            )
            num_ties, of_ties = count_low - count_high, mass_low - mass_high
            missing = target - tl.where(by_mass == 0, count_high.to(tl.float64), mass_high)
            reached = tl.ceil(missing / tl.where(by_mass == 0, 1.0, of_ties / tl.maximum(num_ties, 1))).to(tl.int32)
            reached = tl.minimum(tl.maximum(reached, 1), num_ties)
            num_kept = tl.where(low == least, tl.minimum(reached, num_kept), reached)
            total = mass_high + of_ties * num_kept / tl.maximum(num_ties, 1)
            least = low
    return low, high, num_kept


@triton.jit
def _share_out(values, low, high, num_kept, unit, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """(Mass [PARTS] of what a row keeps of each part's values, how many of each part's ties), of num_kept in all."""
    source, place, room, step = values
    above, mass = tl.zeros((PARTS * WIDTH,), tl.float64), tl.zeros((PARTS * WIDTH,), tl.float64)
    ties = tl.zeros((PARTS * WIDTH,), tl.int32)
    for turn in range(tl.cdiv(tl.max(room, 0), WIDTH)):
        value = tl.load(source + place + turn * step, turn * WIDTH < room, float("-inf"))
        key, one = key_of(value), _mass(value, unit)
        is_tie = (key >= low) & (key <= high)
        above += tl.where(key > high, one, 0.0)
        mass += tl.where(is_tie, one, 0.0)
        ties += is_tie.to(tl.int32)
    above = tl.sum(tl.reshape(above, (PARTS, WIDTH)), 1)
    mass = tl.sum(tl.reshape(mass, (PARTS, WIDTH)), 1)
    ties = tl.sum(tl.reshape(ties, (PARTS, WIDTH)), 1)
    kept = tl.minimum(tl.maximum(num_kept - (tl.cumsum(ties, 0) - ties), 0), ties)
    return above + mass * kept / tl.maximum(ties, 1), kept


@triton.jit
def _settle(
    logits, bands, numbers, masses, inside,  # of the row
    count, share, floor, top,
    total,  # mass of the row
    unit, vocab_size, PARTS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """(low, high, mass [PARTS] of what a row keeps, how many ties of each part).

    It keeps all that is above high, and of the ties in low .. high of each part so many of the lowest ids.
    """
    WIDTH: tl.constexpr = TILE // PARTS
    parts = tl.arange(0, PARTS)
    low, high = tl.load(bands), tl.load(bands + 1)
    kept, within = tl.load(masses + PARTS + parts), tl.load(masses + 2 * PARTS + parts)
    ties = tl.load(numbers + 2 * PARTS + parts)
    if (count == 0) & (share >= 1.0):
        kept += within
    else:
        count_high, mass_high = tl.sum(tl.load(numbers + PARTS + parts), 0), tl.sum(kept, 0)
        count_low, mass_low = count_high + tl.sum(ties, 0), mass_high + tl.sum(within, 0)
        total = tl.where(floor > LEAST, mass_low, total)
        target = tl.where(count > 0, count.to(tl.float64), share * total)
        least = tl.where(count > 0, count_low.to(tl.float64), mass_low)
        most = tl.where(count > 0, count_high.to(tl.float64), mass_high)
        good = (most < target) & ((least >= target) | (low == floor)) & (tl.max(ties, 0) <= ROOM)
        good = good & ((count == 0) | (share >= 1.0) | (count_high == 0))  # top-p may end anywhere above top-k
        part, lane = tl.arange(0, TILE) // WIDTH, tl.arange(0, TILE) % WIDTH
        place = tl.where(good, part * ROOM, part * SIZE) + lane
        room = tl.where(good, tl.load(numbers + 2 * PARTS + part), tl.minimum(vocab_size - part * SIZE, SIZE)) - lane
        values = (tl.where(good, inside, logits), place, room, WIDTH)
        # No good: then over the whole row.
        low, high, kept = tl.where(good, low, floor), tl.where(good, high, top), tl.where(good, kept, 0.0)
        count_high, mass_high = tl.where(good, count_high, 0), tl.where(good, mass_high, 0.0)
        if not good:
            some, weights = _weigh(values, tl.zeros((PIVOTS,), tl.int32) + low, unit, WIDTH)
            count_low, mass_low = tl.max(some, 0), tl.max(weights, 0)
            total = tl.where(floor > LEAST, mass_low, total)
        interval = (low, high, count_low, mass_low, count_high, mass_high)
        low, high, num_kept = _find_end(values, interval, count, share, total, unit, WIDTH)
        more, ties = _share_out(values, low, high, num_kept, unit, PARTS, WIDTH)
        kept += more
    return low, high, kept, ties


@triton.jit
def _first(sums, target, weight, index):
    """The index of the first weight whose sum so far exceeds the target; of the last that is not 0 if none does."""
    found = tl.min(tl.where((sums > target) & (weight > 0.0), index, ALL), 0)
    return tl.where(found < ALL, found, tl.max(tl.where(weight > 0.0, index, 0), 0))


@triton.jit(do_not_specialize=["filtered"])
def _sample_draw_kernel(
    logits, temperature, top_k, top_p, log_min_p, uniform, bands, numbers, masses, inside, tokens, evidence,
    filtered,  # 0: no row is, and there are no bands
    row_stride, vocab_size, PARTS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    top, unit, kept = _overview(numbers, masses, temperature, row, PARTS)
    tl.store(evidence + row, value_of(top))
    if _is_broken(top):
        tl.store(tokens + row, 0)
        return
    logits += row * row_stride
    parts = tl.arange(0, PARTS)
    low, high, ties = top * 0 + LEAST, top * 0 + (LEAST - 1), parts * 0
    count, share, floor = _filters(top_k, top_p, log_min_p, row, top, vocab_size)
    if (filtered != 0) & ((count > 0) | (share < 1.0) | (floor > LEAST)):
        low, high, kept, ties = _settle(
            logits, bands + row * 2, numbers + row * 3 * PARTS, masses + row * 3 * PARTS, inside + row * PARTS * ROOM,
            count, share, floor, top, tl.sum(kept, 0), unit, vocab_size, PARTS, SIZE, ROOM,
        )  # fmt: skip
    target = tl.load(uniform + row) * tl.sum(kept, 0)
    part = _first(tl.cumsum(kept, 0), target, kept, parts)
    target -= tl.sum(tl.where(parts < part, kept, 0.0), 0)
    column = part * SIZE + tl.arange(0, SIZE)
    value = tl.load(logits + column, column < vocab_size, float("-inf"))
    key = key_of(value)
    is_tie = (key >= low) & (key <= high)
    is_kept = is_tie & (tl.cumsum(is_tie.to(tl.int32), 0) <= tl.sum(tl.where(parts == part, ties, 0), 0))
    mass = tl.where((key > high) | is_kept, _mass(value, unit), 0.0)
    tl.store(tokens + row, _first(tl.cumsum(mass, 0), target, mass, column).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    uniform: torch.Tensor,
    filtered: bool,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. Rows of logits may be strided."""
    num_rows, vocab_size = logits.shape
    device, stride = logits.device, logits.stride(0)
    size = min(max(next_power_of_two(triton.cdiv(vocab_size, FEWEST_PARTS)), NEIGHBOURS), LARGEST_PART)
    # Parts beyond the vocabulary are empty. A band with more than `room` values in a part is no good.
    parts, groups, room = next_power_of_two(triton.cdiv(vocab_size, size)), size // NEIGHBOURS, size // 4
    tokens, evidence = out or (
        torch.empty(num_rows, dtype=torch.int64, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
    )
    numbers = torch.empty((num_rows, 3, parts), dtype=torch.int32, device=device)
    masses = torch.empty((num_rows, 3, parts), dtype=torch.float64, device=device)
    bands = torch.empty((num_rows, 2), dtype=torch.int32, device=device)
    leaders = torch.empty((num_rows, parts, groups), dtype=torch.float32, device=device)
    inside = torch.empty((num_rows * filtered, parts, room), dtype=torch.float32, device=device)
    each_row, each_part = (num_rows,), (num_rows, parts)
    _sample_parts_kernel[each_part](
        logits, temperature, numbers, masses, leaders, stride, vocab_size, parts, groups, num_warps=8, **overlap(device)
    )
    if filtered:
        _sample_guess_kernel[each_row](
            logits, leaders, numbers, masses, temperature, top_k, top_p, log_min_p, bands, stride, vocab_size, parts,
            groups, num_warps=16, **overlap(device),
        )  # fmt: skip
        _sample_weigh_kernel[each_part](
            logits, temperature, bands, numbers, masses, inside, stride, vocab_size, parts, size, room,
            min(size, COPIED), num_warps=8, **overlap(device),
        )  # fmt: skip
    _sample_draw_kernel[each_row](
        logits, temperature, top_k, top_p, log_min_p, uniform, bands, numbers, masses, inside, tokens, evidence,
        int(filtered), stride, vocab_size, parts, size, room, num_warps=16, **overlap(device),
    )  # fmt: skip
    return tokens, evidence


KERNEL = Kernel("sample", "triton", sample)
