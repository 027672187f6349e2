"""`deepserve tune`: the best tiles for live shapes on the GPU that is here, as rows of the rooms' tuned tables."""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from deepserve.bench.ops import DTYPES, seconds_of
from deepserve.bench.replay import recorded_cases
from deepserve.errors import AskError, did_you_mean
from deepserve.hardware import this_machine
from deepserve.ops.inventory import ROOMS, inventory
from deepserve.ops.launch import chip
from deepserve.ops.load import load_op
from deepserve.ops.op import Case
from deepserve.ops.tiles import Tile, spaces_of
from deepserve.tune.search import GAIN
from deepserve.tune.tables import Tables
from deepserve.tune.tuner import Outcome, Tuner

Cases = Mapping[str, Sequence[Case]]  # by op


def run(ops: Sequence[str], replay: str | None, dtype: str | None, write: Path | None, limit_s: float) -> int:
    """Tunes the ops named on the GPU that is here, a line and perhaps a row a search; 1 where something could not be.

    `write`: a directory to keep the tables in, instead of the rooms themselves; limit_s: the most of one search.
    """
    hardware = this_machine()
    if hardware.kind == "cpu":
        hint = "run it where the engine is to run; `deepserve ops --compile` compiles for GPUs that are not here"
        raise AskError(f"needs a GPU to measure on, and {hardware.name} is none", field="tune", hint=hint)
    import triton

    recorded, live = recorded_cases(replay) if replay else (None, None)
    cases, dtype = cases_of(ops, live), dtype or recorded or "bf16"
    found = chip(torch.device("cuda", 0))
    tuner = Tuner(DTYPES[dtype], "cuda", found, lambda call: seconds_of(call, "cuda", recordable=True), limit_s)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    stamp = {"date": date, "torch": torch.__version__, "triton": triton.__version__}
    tables, report = Tables(write or ROOMS, found, dtype, stamp), Report()
    print(f"{hardware.name}, {dtype}; a tile has a row where the heuristic's takes more than {GAIN} times as long")
    print(f"{'case':38}{'heuristic':>20}{'µs':>10}{'best':>20}{'µs':>10}{'gain':>8}")
    for outcome in tune(cases, tuner, tables):
        report.add(outcome)
    silent = [f"{name}: no launch asks for a tile" for name in ops if name in tuner.silent]
    return report.close(silent, tables.dropped)


def cases_of(ops: Sequence[str], live: Cases | None) -> Cases:
    """What to tune: recorded calls where there are any, else benchmark cases, of the ops named; without a name, of all
    that may have tiles. AskError where an op named cannot be tuned.
    """
    in_triton = [name for name, infos in inventory().items() if any(info.name == "triton" for info in infos)]
    for name in ops:
        if name not in in_triton:
            raise AskError(f"there is no op {name!r} in Triton", field="ops", hint=did_you_mean(name, in_triton))
        if live is not None and name not in live:
            raise AskError(f"no call of {name} was recorded", field="ops", hint=f"recorded: {', '.join(live)}")
    if live is not None:
        return {name: live[name] for name in ops or live if name in in_triton}
    names = ops or [name for name in in_triton if spaces_of(name)]
    return {name: [case for case in load_op(name).cases if case.bench] for name in names}


def tune(cases: Cases, tuner: Tuner, tables: Tables) -> Iterator[Outcome]:
    """Every outcome, its row written before it is told: what ends a run early takes none of them away."""
    for op_name, own in cases.items():
        for case in own:
            for outcome in tuner.tune(op_name, case):
                tables.update(outcome)
                yield outcome


class Report:
    """Prints what comes of each search, and at the end what came of all."""

    def __init__(self) -> None:
        self._spaces: set[tuple[str, str]] = set()
        self._unfit: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._failures: list[str] = []
        self._num_tried = self._num_left = 0

    def add(self, outcome: Outcome) -> None:
        """A line, with the meaning of its tiles before the first of a space."""
        op_name, name, _ = outcome.asked.place
        if (op_name, name) not in self._spaces:
            self._spaces.add((op_name, name))
            print(f"{op_name}, {name}: {'/'.join(outcome.asked.space.tile)}")
        print(_line(outcome), flush=True)
        where = f"{outcome.op}, {outcome.case}, {name}"
        if outcome.verdict is None:
            self._failures.append(f"{where}: {outcome.problem}")
        self._wrong += [f"{where} with {_text(tile)}: {said}" for tile, said in outcome.tally.wrong.items()]
        self._unfit += outcome.tally.unfit
        self._num_tried += outcome.tally.num_tried
        self._num_left += outcome.tally.num_left

    def close(self, silent: Sequence[str], dropped: Sequence[str]) -> int:
        """The sums, then on stderr what was wrong; the exit status."""
        reasons = "".join(f"; {count} not: {reason}" for reason, count in sorted(self._unfit.items()))
        late = f"; {self._num_left} left out when time was up" if self._num_left else ""
        print(f"{self._num_tried} tiles tried{reasons}{late}")
        for line in (*self._wrong, *dropped, *self._failures, *silent):
            print(line, file=sys.stderr)
        return 1 if self._failures or silent else 0


def _line(outcome: Outcome) -> str:
    verdict = outcome.verdict
    if verdict is None:
        return f"{outcome.case:38}{_text(outcome.asked.default):>20}  {outcome.problem}"
    note = outcome.problem or ("once more" if outcome.is_second_look else "a row" if verdict.is_kept else "")
    return (
        f"{outcome.case:38}{_text(verdict.heuristic):>20}{verdict.heuristic_s * 1e6:10.1f}"
        f"{_text(verdict.tile):>20}{verdict.tile_s * 1e6:10.1f}{verdict.gain - 1:8.1%}  {note}".rstrip()
    )


def _text(tile: Tile) -> str:
    return "/".join(map(str, tile))
