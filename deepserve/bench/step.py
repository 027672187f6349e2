"""`deepserve bench step`: where the time of a decode step goes, read from the timeline that the run itself wrote."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepserve import LLM, SamplingParams
from deepserve.bench.throughput import random_prompts
from deepserve.config import Config
from deepserve.errors import AskError

PARTS = {
    "prepare": "rows enter their slots, the batch is made",
    "forward": "the model; on a GPU until it is launched",
    "sample": "logits, tokens, drafts, what is written back",
    "host gap": "requests are there, and the runner waits for the host",
    "idle": "beside a GPU: all is launched that can be",
}  # one after another, from step to step
BESIDE = {
    "schedule": "the host, in the gap unless it runs ahead",
    "wait": "the host, for a step's result",
    "update": "the host, in the gap unless it runs ahead",
    "logits": "within sample",
    "device: forward": "on the GPU, from its first kernel to its last",
    "device: host gap": "the GPU, from a step's last kernel to the next forward",
}
NUM_SKIPPED = 3  # first decode steps: caches are cold


@dataclass(frozen=True, slots=True)
class Load:
    """`num_requests` with `context` tokens each are decoded for `num_steps`; random tokens from `seed`."""

    num_requests: int
    context: int
    num_steps: int
    seed: int


def run(config: Config, load: Load, with_ops: bool) -> dict[str, Any]:
    """Median milliseconds of a step and of each part of it; with_ops: of all calls of each op in a step too.

    Ops come from a run of their own, since timing them takes time and no step is replayed as a whole (CUDA graphs). On
    a GPU the time of an op is that between two events on the device.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(config.trace_file or f"{directory}/trace.json")
        steps = decode_steps(_events(config, load, file, False), load.num_requests)
        detailed: list[Counter[str]] = []
        if with_ops:
            file = Path(directory) / "ops.json"
            detailed = decode_steps(_events(config, load, file, True), load.num_requests)
    parts = {name: _median(steps, name) for name in (*PARTS, *BESIDE)}
    on_device = any(name.startswith("device: ") for step in steps for name in step)
    ops = {name for step in detailed for name in step if name.startswith("device: ") == on_device}
    return {
        "num_requests": load.num_requests,
        "context": load.context,
        "num_steps": len(steps),
        "step_ms": statistics.median(map(_whole, steps)),
        "parts_ms": {name: value for name, value in parts.items() if any(name in step for step in steps)},
        "ops_step_ms": statistics.median(map(_whole, detailed)) if detailed else 0.0,
        "ops_ms": {name: _median(detailed, name) for name in ops - {*PARTS, *BESIDE, "step"}},
    }


def decode_steps(events: list[dict[str, Any]], num_requests: int) -> list[Counter[str]]:
    """Milliseconds by name of span of each step that decodes for so many requests and is followed by another one.

    Spans count to the step that began last before them; names on the device's lane begin with "device: ".
    """
    spans = sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"])
    steps = [span for span in spans if span["name"] == "step"]
    starts = [span["ts"] for span in steps]
    totals = [Counter[str]() for _ in steps]
    for span in spans:
        if (index := bisect_right(starts, span["ts"]) - 1) >= 0:
            totals[index][("device: " if span["cat"] == "device" else "") + span["name"]] += span["dur"] / 1e3
    decodes = [step["args"]["requests"] == num_requests and not step["args"]["prefills"] for step in steps]
    chosen = [total for total, one, following in zip(totals, decodes, decodes[1:]) if one and following]
    return chosen[NUM_SKIPPED:]


def report(result: dict[str, Any]) -> str:
    """The parts in order, the ops by their share."""
    step_ms, parts = result["step_ms"], result["parts_ms"]
    lines = [
        f"a decode step of {result['num_requests']} requests from {result['context']} tokens on: {step_ms:.3f} ms, "
        f"median of {result['num_steps']}",
        f"{'part':28}{'ms':>9}{'share':>8}",
    ]
    for title, names in (("", PARTS), ("beside and within", BESIDE)):
        lines += [title] if title else []
        for name in (name for name in names if name in parts):
            lines.append(f"{name:28}{parts[name]:9.3f}{parts[name] / step_ms:8.1%}  {names[name]}")
    if result["ops_ms"]:
        total = result["ops_step_ms"]
        lines.append(f"ops, each call timed: {total:.3f} ms a step")
        for name, value in sorted(result["ops_ms"].items(), key=lambda item: -item[1]):
            lines.append(f"{name:28}{value:9.3f}{value / total:8.1%}")
    return "\n".join(lines)


def _events(config: Config, load: Load, file: Path, with_ops: bool) -> list[dict[str, Any]]:
    fields = config.changed() | {"trace_file": str(file), "trace_ops": with_ops}
    llm = LLM(**fields)
    plan = llm.plan
    if load.num_requests > plan.max_num_seqs or load.context + load.num_steps >= plan.max_model_len:
        raise AskError(
            f"{load.num_requests} requests of {load.context} + {load.num_steps} tokens are more than a step of "
            f"{plan.max_num_seqs} requests of {plan.max_model_len} tokens",
            field="num_requests",
            hint="--max-num-seqs, --max-model-len",
        )
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=load.num_steps + 1, detokenize=False)
    llm.generate(random_prompts(llm, load.num_requests, load.context, load.seed), sampling, use_tqdm=False)
    llm.shutdown()
    del llm
    gc.collect()  # the memory is needed for the next engine
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    return events


def _whole(step: Counter[str]) -> float:
    return step["step"] + step["host gap"] + step["idle"]


def _median(steps: list[Counter[str]], name: str) -> float:
    return statistics.median(step[name] for step in steps) if steps else 0.0
