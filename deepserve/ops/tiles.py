"""Tile shapes as data: what a launcher's own heuristic says, unless a row of the room's tuned/<gpu>.json beats it.

A launcher asks its Space for the tile of a live shape; `deepserve tune` measures the candidates and writes the tables.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deepserve.errors import AskError, did_you_mean
from deepserve.ops.inventory import ROOMS

if TYPE_CHECKING:
    from deepserve.ops.launch import Chip

Tile: TypeAlias = tuple[int, ...]  # in the order of Space.tile
Place: TypeAlias = tuple[str, str, tuple[int, ...]]  # op, space, and the key in the order of Space.key
Rows: TypeAlias = Mapping[Place, Tile]

_forced: list[Rows] = []
_noted: list[list[Asked]] = []


@dataclass(frozen=True, slots=True)
class Space:
    """The tiles that one launch of a room can have, and what its choice may depend on.

    `exact` and `rounded` name the small integers of the key; a rounded one is that of the next power of two. `tile`
    names what a tile consists of. `candidates(chip, key)` lists the tiles that are worth a try for a key.
    """

    op: str
    name: str
    exact: tuple[str, ...]
    rounded: tuple[str, ...]
    tile: tuple[str, ...]
    candidates: Callable[[Chip, Mapping[str, int]], Iterable[Tile]]

    @property
    def key(self) -> tuple[str, ...]:
        """The names of the key, in order."""
        return self.exact + self.rounded

    def choose(self, chip: Chip, default: Tile, **shape: int) -> Tile:
        """The tile for a live shape: of the chip's table where that has a row of the same key, else `default`."""
        key = (*[shape[name] for name in self.exact], *[round_up(shape[name]) for name in self.rounded])
        place = (self.op, self.name, key)
        tile = (_forced[-1] if _forced else tuned(self.op, chip)).get(place, default)
        for asked in _noted:
            asked.append(Asked(self, place, default, tile))
        return tile


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a launcher: which tile here, the heuristic saying `default`; the answer was `tile`."""

    space: Space
    place: Place
    default: Tile
    tile: Tile

    @property
    def key(self) -> dict[str, int]:
        """The key by name."""
        return dict(zip(self.space.key, self.place[2]))


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: for `key` `tile` took `microseconds` of a whole call, the heuristic's tile took its own.

    case, date, torch and triton say how that was measured.
    """

    space: str
    key: dict[str, int]
    tile: dict[str, int]
    microseconds: float
    heuristic: dict[str, int]
    heuristic_microseconds: float
    case: str
    date: str
    torch: str
    triton: str


@cache
def spaces_of(op_name: str) -> dict[str, Space]:
    """The spaces that a room declares in its tiles.py, by name; none where it has no such file."""
    if not (ROOMS / op_name / "tiles.py").is_file():
        return {}
    room = importlib.import_module(f"deepserve.ops.{op_name}.tiles")
    return {value.name: value for value in vars(room).values() if isinstance(value, Space)}


@contextmanager
def forced(rows: Rows) -> Iterator[None]:
    """While open, these rows are all the tables there are: where they have none the heuristic decides."""
    _forced.append(rows)
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def noted() -> Iterator[list[Asked]]:
    """While open, what launchers ask is appended to the list."""
    asked: list[Asked] = []
    _noted.append(asked)
    try:
        yield asked
    finally:
        _noted.pop()


def round_up(size: int) -> int:
    """The least power of two that is not below size."""
    return 1 << max(size - 1, 0).bit_length()


def fits(chip: Chip, stages: int, stage_bytes: int) -> bool:
    """Whether a loop that loads `stage_bytes` ahead finds shared memory: Triton keeps a buffer for every stage but one.

    A lower bound: operands that Hopper's matrix instructions read from shared memory take one more.
    """
    return max(stages - 1, 1) * stage_bytes <= chip.shared_bytes


def table_file(op_name: str, gpu: str, rooms: Path = ROOMS) -> Path:
    """Where a room keeps the rows of a GPU, by the name that hardware.py gives it."""
    return rooms / op_name / "tuned" / f"{gpu}.json"


@cache
def tuned(op_name: str, chip: Chip) -> Rows:
    """The rows of a room for a chip, read once. AskError where the table is malformed or does not fit its room."""
    return read_table(op_name, chip, table_file(op_name, chip.gpu)) if chip.gpu else {}


def read_table(op_name: str, chip: Chip, file: Path) -> Rows:
    """The tiles of a file, empty where there is none. AskError as `tuned` has it."""
    found: dict[Place, Tile] = {}
    for number, row in enumerate(read_rows(file)):
        if problem := misfit(op_name, row, chip):
            raise _wrong(file, number, *problem)
        place, tile = placed(op_name, row)
        if place in found:
            raise _wrong(file, number, "has the key of another row", "leave one of them")
        found[place] = tile
    return found


def placed(op_name: str, row: Row) -> tuple[Place, Tile]:
    """A row that fits its room as a launcher looks it up."""
    space = spaces_of(op_name)[row.space]
    return (op_name, row.space, tuple(row.key[name] for name in space.key)), tuple(row.tile[n] for n in space.tile)


def misfit(op_name: str, row: Row, chip: Chip) -> tuple[str, str] | None:
    """(what is wrong, hint) with a row for the spaces of its room as they are now; None where it fits."""
    space = spaces_of(op_name).get(row.space)
    if space is None:
        return f"names no space of {op_name}: {row.space!r}", did_you_mean(row.space, spaces_of(op_name))
    for what, given, names in (("key", row.key, space.key), ("tile", row.tile, space.tile)):
        if set(given) != set(names):
            return f"has a {what} of {', '.join(given) or 'nothing'}", f"a {what} of {', '.join(names)}"
    if unrounded := [name for name in space.rounded if row.key[name] != round_up(row.key[name])]:
        return f"has a key that no shape has: {unrounded[0]} {row.key[unrounded[0]]}", "a power of two"
    if placed(op_name, row)[1] not in space.candidates(chip, row.key):
        return "has a tile that is none of its space's candidates", f"`deepserve tune {op_name}` writes it anew"
    return None


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, none where there is no file. AskError names the row and the field that are malformed."""
    if not file.is_file():
        return []
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AskError(f"is not valid JSON: {error}", field=str(file), hint=_remedy(file)) from None
    if not isinstance(lines, list):
        raise AskError(f"holds a {type(lines).__name__}, not a list of rows", field=str(file), hint=_remedy(file))
    return [_row(file, number, line) for number, line in enumerate(lines)]


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """A row a line, in order of space and key; without rows there is no file."""
    lines = [json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: (row.space, tuple(row.key.values())))]
    if lines:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(".new")  # a tuner that is killed while it writes leaves the old table
        whole.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        whole.replace(file)
    else:
        file.unlink(missing_ok=True)


def _row(file: Path, number: int, line: Any) -> Row:
    names = [field.name for field in fields(Row)]
    if not isinstance(line, dict) or set(line) != set(names):
        raise _wrong(file, number, "has not the fields of a row", ", ".join(names))
    for name in ("key", "tile", "heuristic"):
        values = line[name].values() if isinstance(line[name], dict) else [None]
        if not all(type(value) is int and value >= 0 for value in values):
            raise _wrong(file, number, f"has in {name} what is no integer from 0 on", "an object of them")
    for name in ("microseconds", "heuristic_microseconds"):
        if type(line[name]) not in (int, float) or not line[name] > 0:
            raise _wrong(file, number, f"has no positive number in {name}", _remedy(file))
    if strange := [name for name in ("space", "case", "date", "torch", "triton") if not isinstance(line[name], str)]:
        raise _wrong(file, number, f"has no text in {strange[0]}", _remedy(file))
    return Row(**line)


def _wrong(file: Path, number: int, what: str, hint: str) -> AskError:
    return AskError(f"row {number} {what}", field=str(file), hint=hint)


def _remedy(file: Path) -> str:
    return f"delete it, and let `deepserve tune {file.parent.parent.name}` write it anew"
