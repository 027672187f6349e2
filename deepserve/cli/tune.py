"""`deepserve tune [OP ...]`: searches the best tiles for live shapes on this machine's GPU, writes tuned tables.

A launcher looks its tile up in ops/<op>/tuned/<gpu>.json and takes its own heuristic's where there is no row. Every
candidate is checked against the reference before it is timed, and a row is written where one beats the heuristic by
more than 3 % of a whole call, measured in turns.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


def run(argv: list[str]) -> int:
    """Tune; 1 where a tile that is in use now fails."""
    asked = _parser().parse_args(argv)
    module = importlib.import_module("deepserve.tune.run")
    status: int = module.run(asked.ops, asked.replay, asked.dtype, asked.write, asked.seconds)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepserve tune", description=__doc__, allow_abbrev=False)
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops (default: all that declare tiles)")
    parser.add_argument("--replay", metavar="DIR", help="for the calls that a run with --capture-shapes DIR recorded")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: that of the replay, else bf16")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write DIR/<op>/tuned/<gpu>.json (default: the package)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="for one search (default: 60)")
    return parser
