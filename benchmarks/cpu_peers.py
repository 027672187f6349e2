"""DeepServe and its peers on this machine's CPU: one process an engine, the same prompts, interleaved repeats.

    python benchmarks/cpu_peers.py run [--engines deepserve,vllm] [--models llama-135m] [--repeats 5]
    python benchmarks/cpu_peers.py table [FILE]

`run` appends one JSON line for each engine, model and cell to benchmarks/results/cpu/peers.jsonl; `table` prints the
last run of the file in Markdown. What is measured stands in workloads/cpu.toml. Standard library only.
"""

import argparse
import contextlib
import glob
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/cpu/peers.jsonl"
REFERENCE = "transformers"  # whose tokens the others' are compared with
START = {"name": "start", "title": "start to ready, s"}


class Missing(Exception):
    """An engine, model or cell that cannot be measured; the message says why."""


class Worker:
    """One engine in its own process (peers/worker.py), asked a question at a time."""

    def __init__(self, engine: dict, model: Path, max_model_len: int, peers: Path, log: Path):
        python = ROOT / engine["python"].format(peers=peers)
        if not python.exists():
            raise Missing(f"{engine['python'].format(peers=peers)} does not exist: run benchmarks/setup_peers.sh")
        preload = [path for pattern in engine.get("preload", ()) for path in glob.glob(pattern.format(peers=peers))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **engine.get("environment", {})}
        environment |= {"LD_PRELOAD": ":".join(preload)} if preload else {}
        environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        options = {"max_model_len": max_model_len, **engine.get("options", {})}
        worker = ROOT / "benchmarks/peers/worker.py"
        self._log = log
        self._process = subprocess.Popen(
            [str(python), str(worker), engine["peer"], str(model), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
            text=True,
            start_new_session=True,
        )
        start = time.perf_counter()
        self.ready = self._answer(timeout=600)
        self.start_seconds = time.perf_counter() - start
        os.killpg(self._process.pid, signal.SIGSTOP)

    def ask(self, **question) -> dict:
        """Send one question and wait for its answer. Between questions the engine is stopped: some spin while idle."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Missing(self._last_words()) from None
        answer = self._answer(timeout=300)
        os.killpg(self._process.pid, signal.SIGSTOP)
        return answer

    def _answer(self, timeout: float) -> dict:
        late = threading.Timer(timeout, self.stop)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if not line:
            raise Missing(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended: {lines[-1][:200] if lines else 'without a word'} (whole log: {self._log})"

    def stop(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(args: argparse.Namespace) -> None:
    """Measure all asked engines on all asked models and append the rows to the file."""
    workload = tomllib.loads((ROOT / "benchmarks/workloads/cpu.toml").read_text())
    stamp = _stamp(args)
    scratch = ROOT / ".scratch"
    for name in args.models or workload["models"]:
        rows = []
        try:
            model = _checkpoint(name, scratch)
            rows = _measure(model, {**workload, "engines": _chosen(workload["engines"], args.engines)}, args, scratch)
        except Missing as reason:
            rows = [{"engine": None, "missing": str(reason)}]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as out:
            for row in rows:
                out.write(json.dumps({**stamp, "model": name, **row}) + "\n")
    print(_tables(args.out), end="")


def _chosen(engines: dict, names: list[str] | None) -> dict:
    unknown = set(names or ()) - set(engines)
    if unknown:
        raise SystemExit(f"no engine {', '.join(unknown)}. hint: {', '.join(engines)}")
    return {name: engine for name, engine in engines.items() if not names or name in names}


def _checkpoint(name: str, scratch: Path) -> Path:
    if name == "demo":
        path = ROOT / "deepserve/demo"
        if not (path / "config.json").exists():
            raise Missing("deepserve/demo holds no checkpoint")
        return path
    maker = [
        str(ROOT / ".venv/bin/python"),
        str(ROOT / "benchmarks/checkpoints.py"),
        str(scratch / "checkpoints"),
        name,
    ]
    subprocess.run(maker, check=True, stdout=sys.stderr)
    return scratch / "checkpoints" / name


def _measure(model: Path, workload: dict, args: argparse.Namespace, scratch: Path) -> list[dict]:
    """The rows of one model: all engines are started first, then take turns cell by cell."""
    limit = min(2048, json.loads((model / "config.json").read_text())["max_position_embeddings"])
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    cells = [cell for cell in workload["cells"] if cell["input"] + cell["output"] <= limit]
    workers: dict[str, Worker] = {}
    rows, values, tokens = [], {}, {}
    try:
        for name, engine in workload["engines"].items():
            print(f"{model.name}: starting {name}", file=sys.stderr)
            try:
                log = scratch / "logs" / f"{model.name}-{name}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                workers[name] = Worker(engine, model, limit, args.peers, log)
                values[name, "start"] = [workers[name].start_seconds]
            except Missing as reason:
                rows.append({"engine": name, "missing": str(reason)})
        for repeat in range(-1, args.repeats):  # round -1 warms up
            order = list(workers)
            for name in order[repeat % len(order) :] + order[: repeat % len(order)] if order else ():
                print(f"{model.name}: round {repeat + 1} of {args.repeats}, {name}", file=sys.stderr)
                try:
                    for cell in (cell for cell in cells if name in cell.get("engines", [name])):
                        figure, out = _time_cell(workers[name], cell, vocab, repeat)
                        if repeat >= 0:
                            values.setdefault((name, cell["name"]), []).append(figure)
                            tokens.setdefault((name, cell["name"]), out)
                except Missing as reason:
                    rows.append({"engine": name, "missing": str(reason)})
                    workers.pop(name).stop()
    finally:
        for worker in workers.values():
            worker.stop()
    for name, worker in workers.items():
        about = {"engine": name, "version": worker.ready["version"], "settings": worker.ready["settings"]}
        for cell in (cell for cell in [START, *cells] if (name, cell["name"]) in values):
            measured = [round(value, 3) for value in values[name, cell["name"]]]
            row = {**about, "cell": cell["name"], "title": cell["title"], "values": measured}
            row |= {"median": statistics.median(measured), "min": min(measured), "max": max(measured)}
            rows.append(row | _agreement(tokens, name, cell["name"]))
    return rows


def _prompts(cell: dict, vocab: int, repeat: int) -> list[list[int]]:
    """Random token ids, other ones in every round, the same ones for every engine."""
    draw = random.Random(f"{cell['name']} {repeat}")
    return [[draw.randrange(3, vocab) for _ in range(cell["input"])] for _ in range(cell["requests"])]


def _time_cell(worker: Worker, cell: dict, vocab: int, repeat: int) -> tuple[float, list[list[int]]]:
    """The cell's figure, and the tokens."""
    prompts = _prompts(cell, vocab, repeat)
    answer = worker.ask(prompts=prompts, max_tokens=cell["output"], probe=cell["measure"] == "probe")
    if "probe" in answer:
        return answer["probe"], []
    seconds = answer["seconds"]
    if cell["measure"] == "total":
        figure = cell["requests"] * cell["output"] / seconds
    elif cell["measure"] == "prefill":
        figure = cell["requests"] * cell["input"] / seconds
    elif cell["measure"] == "first_token":
        figure = seconds * 1e3
    else:
        first = worker.ask(prompts=prompts, max_tokens=1)["seconds"]
        figure = (cell["output"] - 1) / max(seconds - first, 1e-9)
    return figure, answer["tokens"]


def _agreement(tokens: dict, name: str, cell: str) -> dict:
    """Of how many requests of the first round the first token equals the reference engine's (later ones follow it)."""
    mine, theirs = tokens.get((name, cell)), tokens.get((REFERENCE, cell))
    if not mine or not theirs or name == REFERENCE:
        return {}
    return {"agrees": f"{sum(one[0] == other[0] for one, other in zip(mine, theirs, strict=True))}/{len(mine)}"}


def _stamp(args: argparse.Namespace) -> dict:
    """Where, when and how: the part that all rows of a run share."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    known = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "run": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", "benchmarks/cpu_peers.py", *sys.argv[1:]]),
        "hardware": {
            "cpu": fields.get("model name", platform.machine()),
            "cores": os.cpu_count(),
            "flags": sorted(known & set(fields.get("flags", "").split())),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "python": platform.python_version(),
        "repeats": args.repeats,
    }


def _tables(path: Path) -> str:
    """The last run of the file as Markdown, one table a model, medians with (min-max)."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist. hint: cpu_peers.py run")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    hardware = rows[0]["hardware"]
    text = (
        f"Run {rows[0]['run']}, commit {rows[0]['commit']}, {rows[0]['repeats']} repeats: {hardware['cores']} cores of "
    )
    text += f"{hardware['cpu']} ({', '.join(hardware['flags'])}), load before {hardware['load_before']}.\n"
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        titles = list(dict.fromkeys(row["title"] for row in mine if "title" in row))
        text += f"\n### {model}\n\n"
        if titles:
            text += "| engine | " + " | ".join(titles) + " |\n" + "|---" * (len(titles) + 1) + "|\n"
        for engine in dict.fromkeys(row["engine"] for row in mine if "title" in row):
            cells = {row["title"]: row for row in mine if row["engine"] == engine and "title" in row}
            version = next(row["version"] for row in cells.values() if "version" in row)
            text += f"| {engine} {version} | " + " | ".join(_cell(cells.get(title)) for title in titles) + " |\n"
        for row in mine:
            if "missing" in row:
                text += f"\n{row['engine'] or model} is missing: {row['missing']}\n"
    return text


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    digits = 1 if row["median"] < 100 else 0
    spread = f" ({row['min']:,.{digits}f}-{row['max']:,.{digits}f})" if len(row["values"]) > 1 else ""
    return f"{row['median']:,.{digits}f}{spread}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measure = verbs.add_parser("run", help="measure, append to the file, print the table")
    measure.add_argument("--engines", type=lambda text: text.split(","), help="default: all of workloads/cpu.toml")
    measure.add_argument("--models", type=lambda text: text.split(","), help="default: all of workloads/cpu.toml")
    measure.add_argument("--repeats", type=int, default=5)
    measure.add_argument("--out", type=Path, default=RESULTS)
    measure.add_argument(
        "--peers", type=Path, default=ROOT / ".scratch/peers", help="made by benchmarks/setup_peers.sh"
    )
    table = verbs.add_parser("table", help="print the last run of a file")
    table.add_argument("file", type=Path, nargs="?", default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        run(args)
    else:
        print(_tables(args.file), end="")


if __name__ == "__main__":
    main()
