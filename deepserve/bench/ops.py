"""`deepserve bench ops`: each kernel on its op's benchmark cases, against its reference and the machine's own roofline.

The roofline is measured here, not read from a data sheet: the bandwidth of a large copy and the rate of a large matrix
product. A kernel that its check finds wrong has no speed: nothing is printed for it, and the status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepserve import __version__
from deepserve.bench.replay import recorded_cases
from deepserve.errors import AskError, did_you_mean
from deepserve.hardware import Hardware, this_machine
from deepserve.ops.check import FP8, check
from deepserve.ops.inventory import inventory, refusals
from deepserve.ops.load import load_kernel, load_op
from deepserve.ops.op import Case, Op

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLUSHED_BYTES = 256 << 20  # written between two calls on a GPU, so that each finds its inputs in memory
FLUSH_S = 60e-6  # which that takes at least
MEASURED_S = 0.3


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes and FLOPs a second that this machine reaches in a plain copy and a plain matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: int, flops: int) -> float:
        """The least time for so much work."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel on one case. `roofline` is the share of it reached; what fits into a cache can exceed 1."""

    op: str
    kernel: str
    case: str
    dtype: str
    microseconds: float
    gigabytes_per_s: float
    teraflops_per_s: float
    roofline: float
    times_reference: float


def run(argv: list[str]) -> int:
    """Bench the ops named (all: none named), print a table, append JSON lines where asked."""
    asked = _parser().parse_args(argv)
    for name in asked.ops:
        if name not in inventory():
            raise AskError(f"there is no op {name!r}", field="ops", hint=did_you_mean(name, inventory()))
    hardware = this_machine()
    recorded, live = recorded_cases(asked.replay) if asked.replay else (None, {})
    dtype = asked.dtype or recorded or ("fp32" if hardware.kind == "cpu" else "bf16")
    roofline = measure_roofline(hardware.device, DTYPES[dtype])
    print(
        f"{hardware.name}, {dtype}, {torch.get_num_threads()} CPU threads; roofline: copy "
        f"{roofline.bytes_per_s / 1e9:.0f} GB/s, matrix product {roofline.flops_per_s / 1e12:.2f} TFLOP/s"
    )
    print(f"{'op':30}{'kernel':11}{'case':38}{'µs':>11}{'GB/s':>9}{'TFLOP/s':>9}{'roofline':>10}{'× reference':>13}")
    wrong = []
    for name in asked.ops or live or inventory():
        for result in bench_op(name, hardware, dtype, roofline, live.get(name, ()) if asked.replay else None):
            if isinstance(result, str):
                wrong.append(result)
                continue
            print(
                f"{result.op:30}{result.kernel:11}{result.case:38}{result.microseconds:11.1f}"
                f"{result.gigabytes_per_s:9.1f}{result.teraflops_per_s:9.3f}{result.roofline:10.1%}"
                f"{result.times_reference:13.2f}",
                flush=True,
            )
            if asked.append:
                _append(asked.append, result, hardware, roofline, argv)
    print("\n".join(wrong), file=sys.stderr, end="\n" * bool(wrong))
    return 1 if wrong else 0


def bench_op(
    op_name: str, hardware: Hardware, dtype: str, roofline: Roofline, cases: Sequence[Case] | None = None
) -> Iterator[Timing | str]:
    """A Timing for each kernel and case (those of the op without any), or the sentence that says what a kernel gets
    wrong."""
    op = load_op(op_name)
    made_in = DTYPES[dtype] if DTYPES[dtype] in op.dtypes else op.dtypes[0]
    if cases is None:
        foreign = FP8[0] if hardware.arch == "gfx942" else FP8[1]  # a chip has instructions for one of them
        cases = [case for case in op.cases if case.bench and case.fp8 is not foreign] or op.cases[-1:]
    for case in cases:
        reference_s = None
        for kernel, reason in refusals(op_name, hardware, dtype).items():
            if reason:
                continue
            seed = random.SystemRandom().randrange(2**31)
            if kernel != "reference" and (sentence := check(op_name, kernel, case, made_in, hardware.device, seed)):
                yield f"{op_name}, {kernel}, {case.name}, seed {seed}: {sentence}"
                continue
            seconds, cost = _time(op, kernel, case, made_in, hardware.device)
            reference_s = reference_s or seconds
            yield Timing(
                op=op_name,
                kernel=kernel,
                case=case.name,
                dtype=next(name for name, known in DTYPES.items() if known == made_in),
                microseconds=seconds * 1e6,
                gigabytes_per_s=cost.num_bytes / seconds / 1e9,
                teraflops_per_s=cost.flops / seconds / 1e12,
                roofline=roofline.seconds(cost.num_bytes, cost.flops) / seconds,
                times_reference=reference_s / seconds,
            )


def measure_roofline(device: str, dtype: torch.dtype) -> Roofline:
    """One large copy and one large matrix product, each timed like a kernel."""
    size, width = (1 << 30, 8192) if device == "cuda" else (1 << 28, 1024)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), device)
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product_s = seconds_of(lambda: left @ right, device)
    return Roofline(2 * size / copy_s, 2 * width**3 / product_s)


def seconds_of(call: Callable[[], Any], device: str, recordable: bool = False) -> float:
    """The median time of a call, after warming up; on a GPU, device time with cold caches.

    A call that takes the host longer than the flush before it would be timed waiting: it is replayed as a graph, whose
    start of some 3 µs counts, if it can be recorded.
    """
    return _gpu_seconds(call, recordable) if device == "cuda" else _cpu_seconds(call)


def _cpu_seconds(call: Callable[[], Any]) -> float:
    times: list[float] = []
    call()
    while sum(times) < MEASURED_S or len(times) < 3:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _gpu_seconds(call: Callable[[], Any], recordable: bool, repeats: int = 50) -> float:
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        started_s = time.perf_counter()
        call()
        host_s = time.perf_counter() - started_s
    if recordable and host_s > FLUSH_S:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for started, ended in events:
        flushed.zero_()
        started.record()
        call()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(started.elapsed_time(ended) for started, ended in events) / 1e3


def _time(op: Op, kernel_name: str, case: Case, dtype: torch.dtype, device: str) -> tuple[float, Any]:
    if op.cost is None:
        raise AskError("states no cost", field=f"op {op.name}", hint="give its spec a cost")
    kernel = load_kernel(op.name, kernel_name)
    arguments = case.make(torch.Generator().manual_seed(0), dtype, device)
    cost = op.cost(*arguments)
    given = kernel.packed(op.parameters, arguments)
    return seconds_of(lambda: kernel.function(*given), device, recordable=kernel_name == "triton"), cost


def _append(file: Path, timing: Timing, hardware: Hardware, roofline: Roofline, argv: list[str]) -> None:
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware.name,
        "deepserve": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["deepserve", "bench", "ops", *argv]),
        "copy_bytes_per_s": round(roofline.bytes_per_s),
        "matmul_flops_per_s": round(roofline.flops_per_s),
    }
    if hardware.kind != "cpu":
        import triton

        stamp["triton"] = triton.__version__
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(timing) | stamp) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepserve bench ops", description=__doc__, allow_abbrev=False)
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--replay", metavar="DIR", help="time the calls that a run with --capture-shapes DIR recorded")
    parser.add_argument("--append", type=Path, metavar="FILE", help="append one JSON object a line to FILE")
    return parser
