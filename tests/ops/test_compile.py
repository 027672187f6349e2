"""Every Triton kernel compiles for every target with no GPU here; a spill or a missing instruction is a failure."""

import json
import os
import subprocess
import sys

import pytest

from deepserve.ops.compile import occupancy
from deepserve.ops.inventory import IN_TRITON, inventory
from deepserve.ops.launch import CHIPS

OPS = [name for name, kernels in inventory().items() if any(info.name in IN_TRITON for info in kernels)]


@pytest.mark.parametrize("target", ["gfx942", "gfx950", "sm_90"])
def test_kernels_compile(target):
    """In a process of its own: here the kernels may be interpreted ones."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "import sys; from deepserve.cli.ops import run; sys.exit(run(sys.argv[1:]))"]
    arguments = ["--compile", "--target", target, "--json"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert row["target"] == target
        assert row["problem"] is None
        assert row["spills"] == 0
        assert 0 < row["registers"] <= (512 if CHIPS[target].is_amd else 255)
        assert row["shared_bytes"] <= CHIPS[target].shared_bytes
        assert 0 < row["occupancy"] <= 1, row
    for op in OPS:
        if op.endswith("_fp8"):
            assert any(row["fp8_conversions"] for row in rows if row["op"] == op), "the FP8 format is emulated"
        widest = max(row["widest_load_bytes"] for row in rows if row["op"] == op)
        assert widest == 16, f"{op} reads {widest} bytes a thread at once: not vectorised"


def test_occupancy():
    assert occupancy("sm_90", 32, 0, 4) == 1  # 16 programs of 4 warps
    assert occupancy("sm_90", 128, 0, 4) == 0.25  # 65,536 / (128 threads x 128 registers) = 4 programs
    assert occupancy("sm_90", 121, 100 << 10, 8) == 0.25  # two of 100 KiB fit, and 2 x 256 x 128 registers
    assert occupancy("gfx942", 64, 0, 4) == 1
    assert occupancy("gfx942", 65, 0, 4) == 0.875  # 7 wavefronts of 72 registers on each SIMD
    assert occupancy("gfx942", 64, 40 << 10, 4) == 0.125  # one program's LDS
    assert occupancy("gfx950", 64, 40 << 10, 4) == 0.5
