"""Without a GPU, Triton's kernels run in its interpreter here: loaded once, under its switch, before anything else."""

import os
import sys

import numpy as np
import pytest
import torch

from deepserve.ops.inventory import IN_TRITON, inventory
from deepserve.ops.load import load_kernel

SWITCH = "TRITON_INTERPRET"


def _convert_float(values, source, target, rounding_mode):
    """A float conversion that rounds to nearest even, by torch.

    The interpreter's own truncates to bf16, and drops the carry where an FP8 value rounds up to a power of two.
    """
    dtypes = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn,
        "fp8e4b8": torch.float8_e4m3fnuz,
    }
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    wide = torch.from_numpy(np.ascontiguousarray(values).view(f"int{source.primitive_bitwidth}").copy())
    wide = wide.view(dtypes[source.name])
    narrow = wide.to(dtypes[target.name]).view(bits[target.primitive_bitwidth // 8])
    return narrow.numpy().view(f"uint{target.primitive_bitwidth}").reshape(values.shape)


def _dot_of_bf16(dot):
    """The interpreter's tl.dot multiplies the bits of bf16 as integers: give it what they mean."""

    def create_dot(self, a, b, d, *rest):
        wide = []
        for handle in (a, b):
            if handle.dtype.scalar.name == "bf16":
                bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
                handle = TensorHandle(bits.view(np.float32), tl.float32)
            wide.append(handle)
        return dot(self, *wide, d, *rest)

    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    return create_dot


def _load_interpreted():
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        import triton.runtime.interpreter

        triton.runtime.interpreter._convert_float = _convert_float
        builder = triton.runtime.interpreter.InterpreterBuilder
        builder.create_dot = _dot_of_bf16(builder.create_dot)
        for name, kernels in inventory().items():
            for info in kernels:
                if info.name in IN_TRITON:
                    load_kernel(name, info.name)
        # The first launch imports the rest of Triton, which must see the switch too.
        load_kernel("embedding", "triton").function(torch.tensor([1]), torch.ones(2, 4))
    finally:
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before


if not torch.cuda.is_available():
    if "triton" in sys.modules:
        pytest.exit("triton was imported before tests/ops could switch its interpreter on", returncode=3)
    _load_interpreted()


@pytest.fixture
def seed() -> int:
    """A fresh seed: that of this test's own stream of random numbers."""
    return int(torch.randint(2**31, ()))
