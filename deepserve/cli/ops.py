"""`deepserve ops`: every op, its kernels, where each can run and why not elsewhere, and what a call costs at least."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from deepserve.errors import AskError, did_you_mean
from deepserve.hardware import Hardware, parse_hardware, this_machine
from deepserve.ops.inventory import inventory, refusals

TARGETS = ("gfx942", "gfx950", "sm_90")


def run(argv: list[str]) -> int:
    """Prints the table, or with --compile what each Triton kernel costs on each target (status 1 on a spill)."""
    asked = _parser().parse_args(argv)
    for name in asked.ops:
        if name not in inventory():
            raise AskError(f"there is no op {name!r}", field="ops", hint=did_you_mean(name, inventory()))
    if asked.compile:
        return _compile(tuple(asked.ops), tuple(asked.target or TARGETS), asked.json)
    hardware = parse_hardware(asked.hardware) if asked.hardware else this_machine()
    rows = [row for name in asked.ops or inventory() for row in op_rows(name, hardware, asked.dtype)]
    if asked.json:
        print("\n".join(json.dumps(row) for row in rows))
    else:
        print(f"kernels on {hardware.label}, {asked.dtype}; least work of one call of the named case")
        print(table(rows))
    return 0


def op_rows(op_name: str, hardware: Hardware, dtype: str) -> list[dict[str, Any]]:
    """One row a kernel; the cost is the op's and stands in its first row."""
    from deepserve.ops.load import load_op

    op = load_op(op_name)
    sample = _sample_cost(op, dtype)
    rows: list[dict[str, Any]] = []
    for info in inventory()[op_name]:
        reason = refusals(op_name, hardware, dtype)[info.name]
        row = {"op": op_name, "kernel": info.name, "exactness": info.exactness, "possible": reason or "yes"}
        rows.append(row | (sample if not rows else dict.fromkeys(sample, "")) | {"fused": "fused" if op.fused else ""})
    return rows


def _sample_cost(op: Any, dtype: str) -> dict[str, str]:
    import torch

    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    made_in = wanted if wanted in op.dtypes else op.dtypes[0]
    case = op.cases[0]
    cost = op.cost(*case.make(torch.Generator().manual_seed(0), made_in, "cpu"))
    return {"case": case.name, "bytes": f"{cost.num_bytes:,}", "FLOPs": f"{cost.flops:,}"}


def table(rows: list[dict[str, Any]]) -> str:
    """Columns as wide as their widest value, numbers to the right."""
    names = list(rows[0]) if rows else []
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in names}
    numeric = {name for name in names if all(str(row[name])[:1].isdigit() or row[name] in ("", None) for row in rows)}

    def line(row: dict[str, Any]) -> str:
        cells = ("" if row[name] is None else str(row[name]) for name in names)
        return "  ".join(
            c.rjust(widths[n]) if n in numeric else c.ljust(widths[n]) for n, c in zip(names, cells)
        ).rstrip()

    return "\n".join([line({name: name for name in names}), *map(line, rows)])


def _compile(op_names: tuple[str, ...], targets: tuple[str, ...], as_json: bool) -> int:
    from deepserve.ops.compile import compile_all

    rows: list[dict[str, Any]] = []
    for compiled in compile_all(op_names, targets):
        rows.append(dataclasses.asdict(compiled))
        if as_json:
            print(json.dumps(rows[-1]), flush=True)
    if not as_json:
        print(table(rows))
    problems = [f"{row['op']} on {row['target']}: {row['kernel']} {row['problem']}" for row in rows if row["problem"]]
    print("\n".join(problems), file=sys.stderr, end="\n" * bool(problems))
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepserve ops", description=__doc__, allow_abbrev=False)
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops")
    parser.add_argument(
        "--hardware", help="a machine that need not be here, as in mi300x or h100:8 (default: this one)"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="what the model computes in")
    parser.add_argument("--compile", action="store_true", help="cross-compile the Triton kernels, no GPU needed")
    parser.add_argument("--target", action="append", choices=TARGETS, help="with --compile: only for this (repeatable)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser
