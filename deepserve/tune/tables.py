"""The rows that a run of the tuner makes, merged into the files that are there. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deepserve.ops.tiles import Place, Row, Tile, misfit, placed, read_rows, table_file, write_rows

if TYPE_CHECKING:
    from deepserve.ops.launch import Chip
    from deepserve.tune.tuner import Outcome


class Tables:
    """The tables of a chip under `rooms`. `stamp` is what every row says of its making: date, torch, triton.

    A key that was searched loses the row it had, and has a new one where a tile beat the heuristic; others stay, but
    for rows that fit their room no more: `dropped` says which and why.
    """

    def __init__(self, rooms: Path, chip: Chip, dtype: str, stamp: Mapping[str, str]):
        self.dropped: list[str] = []
        self._rooms = rooms
        self._chip = chip
        self._dtype = dtype
        self._stamp = stamp
        self._rows: dict[Place, Row | None] = {}
        for file in sorted(rooms.glob(f"*/tuned/{chip.gpu}.json")):
            read_rows(file)  # what is malformed is refused now, not after a search

    def update(self, outcome: Outcome) -> Path | None:
        """Writes what an outcome changes; the file, if it changes one."""
        place, verdict = outcome.asked.place, outcome.verdict
        if outcome.is_second_look:
            if outcome.problem is None:
                return None
            self._rows[place] = None
        elif verdict is None:
            return None
        else:
            self._rows[place] = self._row(outcome) if verdict.is_kept else None
        op_name = place[0]
        file = table_file(op_name, self._chip.gpu, self._rooms)
        rows = self._merged(op_name, file)
        write_rows(file, rows)
        return file

    def _merged(self, op_name: str, file: Path) -> list[Row]:
        rows = [row for place, row in self._rows.items() if place[0] == op_name and row is not None]
        for row in read_rows(file):
            if problem := misfit(op_name, row, self._chip):
                self.dropped.append(f"{file}: dropped a row of {row.space} for {row.key}: {problem[0]}")
            elif placed(op_name, row)[0] not in self._rows:
                rows.append(row)
        return rows

    def _row(self, outcome: Outcome) -> Row:
        asked, verdict = outcome.asked, outcome.verdict
        assert verdict is not None

        def named(tile: Tile) -> dict[str, int]:
            return dict(zip(asked.space.tile, tile))

        return Row(
            space=asked.space.name,
            key=asked.key,
            tile=named(verdict.tile),
            microseconds=round(verdict.tile_s * 1e6, 2),
            heuristic=named(verdict.heuristic),
            heuristic_microseconds=round(verdict.heuristic_s * 1e6, 2),
            case=f"{outcome.op} {outcome.case} {self._dtype}",
            **self._stamp,
        )
