"""Calls that a run recorded (--capture-shapes DIR, recording/shapes.py) as benchmark cases: the same shapes, the same
integers, floating-point numbers of the same mean and deviation."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepserve.errors import AskError
from deepserve.ops.inventory import inventory
from deepserve.ops.load import load_op
from deepserve.ops.op import Case
from deepserve.runner.batch import Batch


def recorded_cases(directory: str) -> tuple[str, dict[str, list[Case]]]:
    """(the dtype that was computed in, cases by op, the most frequent first) of all files of a directory.

    AskError where there are none, or where they are not of one dtype.
    """
    lines = [json.loads(line) for file in sorted(Path(directory).glob("*.jsonl")) for line in file.open()]
    dtypes = {line["dtype"] for line in lines if "plan" in line}
    if len(dtypes) != 1:
        found = f"runs in {', '.join(sorted(dtypes))}" if dtypes else "no recorded run"
        raise AskError(f"{directory} holds {found}", field="replay", hint="what --capture-shapes DIR wrote")
    (dtype,) = dtypes
    cases: dict[str, list[Case]] = {}
    for line in sorted((line for line in lines if line.get("op") in inventory()), key=lambda line: -line["calls"]):
        if len(line["args"]) == len(load_op(line["op"]).parameters):
            cases.setdefault(line["op"], []).append(_case(line, dtype))
    return dtype, cases


def _case(line: dict[str, Any], recorded_dtype: str) -> Case:
    own = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[recorded_dtype]

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        return tuple(_made(told, own, generator, dtype, device) for told in line["args"])

    shapes = ["x".join(map(str, told["tensor"])) for told in line["args"] if "tensor" in told]
    batches = [told["batch"] for told in line["args"] if "batch" in told]
    rows = [f"{len(batch['query_lens']['value'])} to {batch['max_seq_len']['value']}" for batch in batches]
    return Case(f"{line['calls']} × {' '.join([*shapes[:2], *rows])}", make, bench=True)


def _made(told: dict[str, Any], own: str, generator: torch.Generator, dtype: torch.dtype, device: str) -> Any:
    if "batch" in told:
        return Batch(**{name: _made(value, own, generator, dtype, device) for name, value in told["batch"].items()})
    if "value" in told:
        return told["value"]
    if "tensor" not in told:
        return getattr(torch, told["dtype"])
    shape, kind = told["tensor"], getattr(torch, told["dtype"])
    if "values" in told:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(told["values"])), told["dtype"])
        return torch.from_numpy(numbers.reshape(shape).copy()).to(device)
    if "std" not in told:
        low, high = told.get("low", 0), told.get("high", 256)
        return torch.randint(low, high, shape, generator=generator, dtype=kind).to(device)
    numbers = torch.randn(shape, generator=generator) * told["std"] + told["mean"]
    return numbers.to(dtype if told["dtype"] == own else kind).to(device)
