"""The search itself, with no GPU in it: candidates that are tried, and a verdict on the best one. No torch.

Near tiles first: in a limited time the search is a descent from the heuristic, in enough time it is exhaustive.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from deepserve.ops.tiles import Tile

GAIN = 1.03  # a row is kept where the heuristic takes more than so many times its time
ALTERNATIONS = 8  # of heuristic and candidate in a verdict


class Unfit(Exception):
    """A tile that cannot be run: str() is the reason, in the same words for all that it is true of."""


class Trial(Protocol):
    """One call of one op in which one launch can be given any tile. Both methods raise Unfit."""

    def difference(self, tile: Tile) -> str | None:
        """None where the result is right with this tile, else what is wrong."""

    def seconds(self, tile: Tile) -> float:
        """How long the call takes with this tile."""


@dataclass(slots=True)
class Tally:
    """What became of the candidates: those tried in time, the wrong ones with what they got wrong, reasons of the unfit
    ones with their number, and how many there was no time for.
    """

    num_tried: int = 0
    wrong: dict[Tile, str] = field(default_factory=dict)
    unfit: Counter[str] = field(default_factory=Counter)
    num_left: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The heuristic's tile against another: the median times of a whole call, measured in turns."""

    heuristic: Tile
    heuristic_s: float
    tile: Tile
    tile_s: float

    @property
    def gain(self) -> float:
        """How many times as long the heuristic's tile takes."""
        return self.heuristic_s / self.tile_s

    @property
    def is_kept(self) -> bool:
        """Whether the tile is worth a row."""
        return self.tile != self.heuristic and self.gain > GAIN


def search(
    heuristic: Tile, candidates: Iterable[Tile], trial: Trial, limit_s: float, now: Callable[[], float] = time.monotonic
) -> tuple[Verdict, Tally]:
    """The best candidate that is right against the heuristic's tile, which must be right (ValueError: it is not)."""
    started, tally = now(), Tally()
    if sentence := trial.difference(heuristic):
        raise ValueError(sentence)
    best, best_s = heuristic, trial.seconds(heuristic)
    left = [tile for tile in candidates if tile != heuristic]
    while left and now() - started < limit_s:
        tile = min(left, key=lambda tile: distance(tile, best))
        left.remove(tile)
        try:
            sentence = trial.difference(tile)
            seconds = math.inf if sentence else trial.seconds(tile)
        except Unfit as reason:
            tally.unfit[str(reason)] += 1
            continue
        tally.num_tried += 1
        if sentence:
            tally.wrong[tile] = sentence
        if seconds < best_s:
            best, best_s = tile, seconds
    tally.num_left = len(left)
    return duel(heuristic, best, trial), tally


def duel(heuristic: Tile, tile: Tile, trial: Trial) -> Verdict:
    """Both in turns, each first as often as second: what changes on the machine meanwhile changes for both."""
    times: dict[Tile, list[float]] = {heuristic: [], tile: []}
    for number in range(ALTERNATIONS):
        for one in list(times) if number % 2 else reversed(times):
            times[one].append(trial.seconds(one))
    return Verdict(heuristic, statistics.median(times[heuristic]), tile, statistics.median(times[tile]))


def distance(one: Tile, other: Tile) -> float:
    """How many times something must be doubled or halved to make one tile of the other."""
    return sum(abs(math.log2(max(a, 0.5) / max(b, 0.5))) for a, b in zip(one, other))
