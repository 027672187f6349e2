"""Runs the search over an op's calls: every launch that asks for a tile is one search, the next with its answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from deepserve.ops.check import Comparison
from deepserve.ops.launch import Chip
from deepserve.ops.load import load_op
from deepserve.ops.op import Case
from deepserve.ops.tiles import Asked, Place, Rows, Tile, forced, noted
from deepserve.tune.search import GAIN, Tally, Unfit, Verdict, duel, search

Clock: TypeAlias = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search came to, or a second look at its answer by another call. `problem`: why there is no verdict, or
    why there is a row no more.
    """

    op: str  # that was called: its launches may ask another room
    case: str
    asked: Asked
    verdict: Verdict | None
    tally: Tally
    problem: str | None = None
    is_second_look: bool = False


class CallTrial:
    """A call of an op's Triton kernel in which one launch gets the tile under trial, and others what `kept` says."""

    def __init__(self, comparison: Comparison, place: Place, kept: Rows, clock: Clock):
        self._comparison = comparison
        self._place = place
        self._kept = kept
        self._clock = clock

    def difference(self, tile: Tile) -> str | None:
        """See Trial."""
        with self._having(tile):
            return self._comparison.difference()

    def seconds(self, tile: Tile) -> float:
        """See Trial."""
        with self._having(tile):
            return self._clock(self._comparison.call)

    @contextmanager
    def _having(self, tile: Tile) -> Iterator[None]:
        from triton.errors import TritonError
        from triton.runtime.errors import OutOfResources

        try:
            with forced({**self._kept, self._place: tile}):
                yield
        except OutOfResources as error:
            raise Unfit(f"more {error.name} than there is") from error
        except TritonError as error:
            raise Unfit(f"does not compile: {type(error).__name__}") from error
        except RuntimeError as error:
            if "PassManager" in str(error):  # as the compiler says it; after anything else the GPU may be unusable
                raise Unfit("does not compile: a pass failed") from error
            error.add_note(f"with the tile {tile} for {self._place}")
            raise


class Tuner:
    """Tunes call after call. `kept` holds the tiles that won; a key is searched once, for the first call that has it,
    and what won there is dropped again if another call of the key is slower with it. `silent`: ops that ask nothing.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        chip: Chip,
        clock: Clock,
        limit_s: float,
        now: Callable[[], float] = time.monotonic,
    ):
        self.kept: dict[Place, Tile] = {}
        self.silent: set[str] = set()
        self._settled: set[Place] = set()
        self._dtype = dtype
        self._device = device
        self._chip = chip
        self._clock = clock
        self._limit_s = limit_s
        self._now = now

    def tune(self, op_name: str, case: Case) -> Iterator[Outcome]:
        """An outcome for every tile that a call asks for, in the order of the launches; none where it asks for none."""
        if op_name in self.silent:
            return
        dtypes, seed = load_op(op_name).dtypes, random.SystemRandom().randrange(2**31)
        made_in = self._dtype if self._dtype in dtypes else dtypes[0]
        comparison = Comparison(op_name, "triton", case, made_in, self._device, seed)
        number = 0
        while number < len(questions := self._questions(comparison)):
            asked = questions[number]
            number += 1
            trial = CallTrial(comparison, asked.place, dict(self.kept), self._clock)
            if asked.place not in self._settled:
                yield self._search(op_name, case.name, asked, trial)
            elif self.kept.get(asked.place, asked.default) != asked.default:
                yield self._look_again(op_name, case.name, asked, trial)
        if not number:
            self.silent.add(op_name)

    def _questions(self, comparison: Comparison) -> list[Asked]:
        """What the call asks now, each place once: a launch may ask what an earlier one's answer makes it ask."""
        with forced(self.kept), noted() as asked:
            comparison.call()
        return list({one.place: one for one in asked}.values())

    def _search(self, op_name: str, case: str, asked: Asked, trial: CallTrial) -> Outcome:
        self._settled.add(asked.place)
        candidates = asked.space.candidates(self._chip, asked.key)
        try:
            verdict, tally = search(asked.default, candidates, trial, self._limit_s, self._now)
        except (ValueError, Unfit) as error:
            return Outcome(op_name, case, asked, None, Tally(), f"the heuristic's tile: {error}")
        if verdict.is_kept:
            self.kept[asked.place] = verdict.tile
        return Outcome(op_name, case, asked, verdict, tally)

    def _look_again(self, op_name: str, case: str, asked: Asked, trial: CallTrial) -> Outcome:
        tile, verdict = self.kept[asked.place], None
        try:
            problem = trial.difference(tile)
            if problem is None:
                verdict = duel(asked.default, tile, trial)
                problem = "slower here, dropped" if verdict.gain * GAIN < 1 else None
        except Unfit as reason:
            problem = str(reason)
        if problem:
            del self.kept[asked.place]
        return Outcome(op_name, case, asked, verdict, Tally(), problem, is_second_look=True)
