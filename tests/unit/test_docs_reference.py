"""The generated pages are those that the code would write now."""

from pathlib import Path

import pytest

from deepserve.cli.docs import pages, run
from deepserve.config import knobs
from deepserve.ops.inventory import inventory
from deepserve.optimizations import ROWS
from deepserve.spellings import flag

REFERENCE = Path(__file__).parents[2] / "docs/reference"


@pytest.mark.parametrize("name", pages())
def test_a_page_is_current(name) -> None:
    assert (REFERENCE / name).read_text() == pages()[name], "run `make docs`"


def test_nothing_else_lies_there() -> None:
    assert {path.name for path in REFERENCE.iterdir()} == set(pages())


def test_the_pages_leave_nothing_out() -> None:
    made = pages()
    assert all(f"`{flag(name)}`" in made["flags.md"] for name in knobs())
    assert all(f"`{name}`" in made["optimizations.md"] for name in ROWS)
    assert all(f"`{name}`" in made["ops.md"] for name in inventory())


def test_they_are_written_where_they_are_wanted(tmp_path, capsys) -> None:
    assert run([str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(pages())
