"""`deepserve ablate`: what each optimization is worth on a workload, and whether it fired and kept its promise.

The ladder starts with none and adds one row at a time, in the order of the table; leave-one-out starts with all. The
two ends meet in "all", which is measured twice: how far it is from itself is the noise floor. A round visits every
set-up once, in random order, each in a new engine with the same prompts.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import platform
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deepserve import LLM, SamplingParams, __version__
from deepserve.bench.exactness import TOP, judge
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.facts import gather_facts
from deepserve.optimizations import ROWS, TABLE
from deepserve.plan import make_plan

AGAIN = "all again"
MEASURED_S = 0.2  # a cell is repeated with other prompts until it has taken so long in all; the median counts


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """A configuration: which rows are on. `row` is the one that makes the difference to the set-up `against`."""

    name: str
    rows: tuple[str, ...]
    row: str | None = None
    against: str | None = None


def setups(on: Sequence[str]) -> list[Setup]:
    """The ladder (none, + row, ...; the last of it is all), all again, and all without each (- row)."""
    ladder = [Setup("none", ())]
    for count, row in enumerate(on, 1):
        ladder.append(Setup(f"+ {row}" if count < len(on) else "all", tuple(on[:count]), row, ladder[-1].name))
    left_out = [Setup(f"- {row}", tuple(_without(row, on)), row, "all") for row in on[:-1]]
    return [*ladder, Setup(AGAIN, tuple(on)), *left_out]


def _without(row: str, on: Sequence[str]) -> list[str]:
    """All but the row and those that cannot be on without it."""
    kept: list[str] = []
    for name in on:
        if name != row and all(set(one.split(" or ")) & set(kept) for one in ROWS[name].requires):
            kept.append(name)
    return kept


def fields_of(config: Config, rows: Sequence[str]) -> dict[str, Any]:
    """Fields of Config for these rows and no others. A step without chunked prefill is as long as it must be."""
    fields = config.changed()
    for row in TABLE:
        if row.name not in rows and row.field:
            fields.pop(row.field, None)
    if "chunked_prefill" not in rows:
        fields.pop("max_num_batched_tokens", None)
    asked = tuple(name for name in rows if name in config.on or ROWS[name].default != "on")
    return fields | {"on": asked, "off": tuple(name for name in ROWS if name not in rows)}


def run(config: Config, cells: Sequence[dict[str, Any]], num_rounds: int, stamp: dict[str, Any]) -> Iterator[dict]:
    """One line a set-up and round: tokens a second by cell, what fired, what the gate says; stamped."""
    plan = make_plan(config, gather_facts(config))
    on = [row.name for row in TABLE if plan.optimizations[row.name]]
    if not on:
        raise AskError("no optimization is on: there is nothing to take apart", field="ablate")
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{plan.hardware.name}, {plan.num_threads} cores" if plan.device == "cpu" else plan.hardware.label,
        "deepserve": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": plan.dtype,
        "plan": plan.hash,
        **stamp,
    }
    for _ in range(num_rounds):
        seed = random.SystemRandom().randrange(2**32)
        order = setups(on)
        random.Random(seed).shuffle(order)
        measured, answers = [], {}
        for setup in order:
            line, answers[setup.name] = _measure(fields_of(config, setup.rows), cells, seed)
            measured.append((setup, line))
        for setup, line in sorted(measured, key=lambda pair: setups(on).index(pair[0])):
            if setup.row is not None and setup.against is not None:
                pair = answers[setup.name], answers[setup.against]
                with_row, without = pair if setup.row in setup.rows else pair[::-1]
                line["gate"] = dataclasses.asdict(judge(ROWS[setup.row].exactness, plan.dtype, with_row, without))
            told = {"setup": setup.name, "row": setup.row, "against": setup.against, "round": seed}
            yield stamp | told | line


def _measure(fields: dict[str, Any], cells: Sequence[dict[str, Any]], seed: int) -> tuple[dict[str, Any], list[Any]]:
    llm = LLM(**fields)
    built = dict(llm.engine.counters)
    answers = _answers(llm)
    values = {}
    before = dict(llm.engine.counters)
    for cell in cells:
        rng = random.Random(f"{cell['name']} {seed}")
        _seconds(llm, cell, min(cell["output"], 2), rng)
        times: list[float] = []
        while sum(times) < MEASURED_S:
            times.append(_seconds(llm, cell, cell["output"], rng))
        values[cell["name"]] = cell["requests"] * cell[cell["measure"]] / statistics.median(times)
    after = llm.engine.counters
    # What is counted once, in the graph, stands from the start; of the rest, the gate's share is taken off.
    fired = {name: after[name] - before.get(name, 0) + built.get(name, 0) for name in after}
    llm.shutdown()
    del llm
    gc.collect()
    return {"tokens_per_s": values, "fired": {name: count for name, count in fired.items() if count}}, answers


def _seconds(llm: LLM, cell: dict[str, Any], num_output: int, rng: random.Random) -> float:
    special = llm.tokenizer.special_ids if llm.tokenizer else ()
    ordinary = [token for token in range(llm.plan.architecture.vocab_size) if token not in special]
    shared = rng.choices(ordinary, k=cell.get("shared", 0))
    prompts = [shared + rng.choices(ordinary, k=cell["input"] - len(shared)) for _ in range(cell["requests"])]
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_output, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - start


def _answers(llm: LLM) -> list[Any]:
    """What the gate compares: greedy answers to prompts that share beginnings, span steps, end inside blocks; twice."""
    rng = random.Random(0)
    vocab_size, longest = llm.plan.architecture.vocab_size, llm.plan.max_model_len - 16
    shared = rng.choices(range(vocab_size), k=min(37, longest // 2))
    lengths = (2, 1, 3, min(90, longest // 2), min(300, longest // 2))
    prompts = [[*shared, *rng.choices(range(vocab_size), k=length)] for length in lengths]
    prompts += [rng.choices(range(vocab_size), k=length) for length in (1, 3, 33)]
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8, logprobs=TOP, detokenize=False)
    tokens: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    rounds = [llm.generate(tokens, sampling, use_tqdm=False) for _ in range(2)]
    return [output.outputs[0] for outputs in rounds for output in outputs]
