"""The table of devices, their spelling, and what /proc says of a CPU."""

import os

import pytest

from deepserve.errors import AskError
from deepserve.hardware import GIB, TABLE, parse_hardware, this_cpu, this_machine

CPUINFO = """processor\t: {n}
model name\t: Some CPU
flags\t\t: fpu avx2 avx512f avx512_bf16
physical id\t: 0
core id\t\t: {core}
"""


def cpu(files, cores=lambda n: n):
    entries = "\n\n".join(CPUINFO.format(n=n, core=cores(n)).strip() for n in sorted(os.sched_getaffinity(0)))
    text = {"/proc/cpuinfo": entries, "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"} | files
    return this_cpu(lambda path: text.get(path, ""))


@pytest.mark.parametrize("text", ["mi300x:8", "8xMI300X", "8 x mi300x", " MI300X:8 "])
def test_spellings(text) -> None:
    hardware = parse_hardware(text)
    assert (hardware.name, hardware.count, hardware.device, hardware.arch) == ("MI300X", 8, "cuda", "gfx942")
    assert hardware.label == "8 x MI300X"


@pytest.mark.parametrize("text", ["", "mi300", "h100:0", "8xh100:8", "cpu:2", "h100:-1", "h100:8:8", "tpu"])
def test_unknown_hardware_is_refused(text) -> None:
    with pytest.raises(AskError) as caught:
        parse_hardware(text)
    assert caught.value.field == "hardware"


def test_the_table_has_what_the_plan_needs() -> None:
    assert set(TABLE) == {"mi300x", "mi325x", "mi350x", "mi355x", "h100", "h200", "b200"}
    for name, row in TABLE.items():
        assert parse_hardware(name) == row
        assert row.memory_bytes > 70 * GIB
        assert 3e12 < row.bandwidth <= 8e12
        assert row.flops["fp8"] == pytest.approx(2 * row.flops["bf16"], rel=0.01)


def test_a_cpu_from_proc() -> None:
    hardware = cpu({})
    assert (hardware.kind, hardware.name, hardware.device) == ("cpu", "Some CPU", "cpu")
    assert hardware.features == {"avx2", "avx512f", "avx512_bf16"}
    assert hardware.memory_bytes == 16 * GIB
    assert hardware.available_bytes == 8 * GIB
    assert hardware.num_cores == len(os.sched_getaffinity(0))


def test_threads_of_one_core_count_once() -> None:
    assert cpu({}, cores=lambda n: 0).num_cores == 1


def test_the_cgroup_limits_memory_and_cores() -> None:
    files = {"/sys/fs/cgroup/memory.max": str(4 * GIB), "/sys/fs/cgroup/memory.current": str(GIB)}
    hardware = cpu({**files, "/sys/fs/cgroup/cpu.max": "100000 100000"})
    assert hardware.memory_bytes == 4 * GIB
    assert hardware.available_bytes == 3 * GIB
    assert hardware.num_cores == 1


def test_no_proc_at_all_is_survived() -> None:
    hardware = this_cpu(lambda path: "")
    assert hardware.num_cores >= 1
    assert hardware.available_bytes == 0


def test_this_machine_exists() -> None:
    hardware = this_machine()
    assert hardware.available_bytes > 0
    assert hardware.kind in ("cpu", "cuda", "hip")
