"""`deepserve ops` and `deepserve bench ops`, at their doors."""

import json

import pytest
import torch

from deepserve.bench import ops as bench
from deepserve.bench.ops import Roofline, Timing, bench_op
from deepserve.cli.ops import run
from deepserve.errors import AskError
from deepserve.hardware import this_cpu
from deepserve.ops.inventory import inventory

ROOFLINE = Roofline(1e10, 1e11)


def rows(capsys, *argv):
    assert run([*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_kernel_has_a_row(capsys):
    named = [(row["op"], row["kernel"]) for row in rows(capsys, "--hardware", "cpu")]
    assert named == [(op, info.name) for op, infos in inventory().items() for info in infos]


def test_what_is_possible_depends_on_the_machine(capsys):
    def possible(hardware):
        return {row["kernel"]: row["possible"] for row in rows(capsys, "rms_norm", "--hardware", hardware)}

    assert possible("mi300x:8")["triton"] == "yes"
    assert possible("h100")["cpu"] == "runs on a CPU only, and H100 is none"
    assert possible("cpu")["cpu"] == "yes"
    assert possible("cpu")["triton"].startswith("needs an AMD or NVIDIA GPU")


def test_the_table_lines_up(capsys):
    assert run(["sample", "add_rms_norm", "--dtype", "fp32"]) == 0
    _, header, *lines = capsys.readouterr().out.splitlines()
    start = header.index("possible")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_an_unknown_op_is_refused_with_a_suggestion():
    for door in (run, bench.run):
        with pytest.raises(AskError, match="rms_norm") as refused:
            door(["rmsnorm"])
        assert refused.value.field == "ops"


def test_bench_times_kernels_against_the_reference():
    results = list(bench_op("write_latent", this_cpu(), "fp32", ROOFLINE))
    timed = [(result.kernel, result.case) for result in results]
    assert timed == [("reference", "T4096-W576-512x64"), ("reference", "T32768-W576-1024x64")]
    timing = results[0]
    num_bytes = 4096 * (2 * 576 * 4 + 8)
    assert timing.gigabytes_per_s == pytest.approx(num_bytes / timing.microseconds / 1e3)
    assert timing.roofline == pytest.approx(timing.gigabytes_per_s / 10)
    assert timing.times_reference == 1


def test_bench_prints_no_speed_of_a_wrong_kernel(monkeypatch, capsys, tmp_path):
    timed = []

    def time(op, kernel, case, dtype, device):
        timed.append(kernel)
        return 1e-3, op.cost(*op.cases[0].make(torch.Generator(), dtype, "cpu"))

    monkeypatch.setattr(bench, "_time", time)
    monkeypatch.setattr(bench, "measure_roofline", lambda device, dtype: ROOFLINE)
    monkeypatch.setattr(bench, "check", lambda op, kernel, *rest: "3 of 4 elements differ")
    monkeypatch.setattr(bench, "this_machine", this_cpu)
    file = tmp_path / "cpu" / "ops.jsonl"
    assert bench.run(["silu_mul", "--append", str(file)]) == 1
    out, err = capsys.readouterr()
    assert timed == ["reference"]
    assert "silu_mul, cpu, 4096x36864" in err and "3 of 4 elements differ" in err
    assert "cpu" not in [line.split()[1] for line in out.splitlines()[2:]]
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["command"] == f"deepserve bench ops silu_mul --append {file}"
    assert line.keys() >= {"date", "hardware", "torch", "copy_bytes_per_s", *Timing.__dataclass_fields__}
