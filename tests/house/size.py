"""Counts the lines of the package: the budget that keeps it readable by one person. `make size` prints them."""

import os
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 27_000  # 12,000 for the foundation, 12,000 for V3.2, V4, speculation, tools and doors, the rest for GPUs
SOURCES = {".py", ".c", ".h", ".sh", ".js", ".css", ".html"}


def product_files() -> dict[str, int]:
    """Lines that count by path from the root, for every source file that ships (test_*.py beside an op does not)."""
    lines = {}
    for folder, folders, names in os.walk(ROOT / "deepserve"):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith("test_")):
            if path.suffix in SOURCES:
                stripped = map(str.strip, path.read_text().splitlines())
                lines[str(path.relative_to(ROOT))] = sum(1 for line in stripped if line and not line.startswith("#"))
    return lines


def main() -> None:
    files = product_files()
    rooms = Counter()
    for path, count in files.items():
        rooms["/".join(Path(path).parts[:2])] += count
    for room, count in sorted(rooms.items()):
        print(f"{count:7,}  {room}")
    print(f"{sum(files.values()):7,}  of {BUDGET:,} lines, in {len(files)} files; the largest:")
    for path, count in sorted(files.items(), key=lambda item: -item[1])[:10]:
        print(f"{count:7,}  {path}")


if __name__ == "__main__":
    main()
