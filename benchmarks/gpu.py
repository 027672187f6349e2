"""DeepServe's workloads on one GPU: needs torch, triton, numpy, safetensors and tokenizers, no network, no checkpoint.

    python benchmarks/gpu.py [--cells 1x1024,16x1024] [--repeats 3] [--set max_num_seqs=256 off=cuda_graphs]

One engine; every cell of workloads/gpu.toml `repeats` times with fresh prompts, after one small batch unmeasured (the
engine's start has compiled every kernel: how many were compiled later is told). A JSON line a cell, stamped with
hardware, versions, plan and command.
"""

import argparse
import datetime
import json
import logging
import platform
import random
import shlex
import statistics
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=ROOT / "benchmarks/workloads/gpu.toml")
    parser.add_argument("--cells", default="", help="only those whose names begin so (spaces left out)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of the Config to change")
    parser.add_argument("--append", type=Path, metavar="FILE", help="append one JSON object a line")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workload = tomllib.loads(asked.workload.read_text())
    config = workload["config"] | dict(map(_setting, asked.set))
    names = tuple(asked.cells.split(",")) if asked.cells else ("",)
    cells = [cell for cell in workload["cells"] if cell["name"].replace(" ", "").startswith(names)]

    start = time.perf_counter()
    from deepserve import LLM

    llm = LLM(workload["model"], **config)
    stamp = _stamp(llm, config) | {"start_s": round(time.perf_counter() - start, 1)}
    print(f"start to ready: {stamp['start_s']} s")
    _generate(llm, {"requests": 2, "input": 100, "output": 4})
    for cell in cells:
        row = measure(llm, cell, asked.repeats)
        print(
            f"{cell['name']:16} {row['value']:10,.0f} {cell['measure']} tok/s  {row['ratio']:5.2f} x peer  "
            f"{row['values']}",
            flush=True,
        )
        if asked.append:
            asked.append.parent.mkdir(parents=True, exist_ok=True)
            with asked.append.open("a") as lines:
                lines.write(json.dumps(row | stamp) + "\n")
    print(f"kernels compiled after the start: {llm.engine.counters['kernels_compiled_while_serving']}")
    print({name: count for name, count in llm.engine.counters.items() if count})


def measure(llm, cell: dict, repeats: int) -> dict:
    """The median of the cell's tokens a second over the repeats, and what a peer reached."""
    values = [cell["requests"] * cell[cell["measure"]] / _generate(llm, cell) for _ in range(repeats)]
    value, compiled = statistics.median(values), llm.engine.counters["kernels_compiled_while_serving"]
    rounded = [round(one, 1) for one in values]
    return {**cell, "value": value, "values": rounded, "ratio": value / cell["peer"], "compiled_so_far": compiled}


def _generate(llm, cell: dict) -> float:
    """Seconds for the cell's requests, all at once, with fresh prompts."""
    from deepserve import SamplingParams

    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=cell["output"], detokenize=False)
    vocab_size = llm.plan.architecture.vocab_size
    prompts = [[random.randrange(vocab_size) for _ in range(cell["input"])] for _ in range(cell["requests"])]
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    elapsed = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == cell["output"] for output in outputs)
    return elapsed


def _setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value.split(",")


def _stamp(llm, config: dict) -> dict:
    import torch
    import triton

    from deepserve import __version__

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name(),
        "deepserve": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "config": config,
        "plan": llm.plan.hash,
        "command": shlex.join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
