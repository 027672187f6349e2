"""Matrix product with a weight, the hot path of everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepserve.ops.inventory import INVARIANT, REFERENCE, KernelInfo, a_cpu, triton
from deepserve.ops.native import NATIVE

if TYPE_CHECKING:
    from deepserve.hardware import Hardware

_INSTRUCTIONS = {"bf16": {"avx512f", "bf16"}, "fp16": {"avx512_fp16"}}


def needs_onednn(hardware: Hardware, dtype: str) -> str | None:
    """Needs a CPU whose instructions oneDNN has a kernel of this dtype for."""
    wanted = _INSTRUCTIONS.get(dtype)
    if hardware.kind == "cpu" and wanted and not wanted & hardware.features:
        return f"oneDNN multiplies {dtype} on a CPU with {' or '.join(sorted(wanted))} only"
    return a_cpu(hardware, dtype)


KERNELS = (REFERENCE, KernelInfo("onednn", "onednn", needs_onednn, "tolerance"), triton("tolerance"), NATIVE, INVARIANT)
