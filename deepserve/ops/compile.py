"""Compiles Triton kernels for GPUs that are not here, and reads from the machine code what they would cost there.

A launcher runs on meta tensors with launching replaced by taking notes, so what is compiled is what would be launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from deepserve.errors import AskError
from deepserve.ops.inventory import IN_TRITON, inventory
from deepserve.ops.launch import CHIPS, LANES, assuming
from deepserve.ops.load import load_kernel, load_op
from deepserve.ops.op import Case, Op

TARGETS = {"gfx942": ("hip", "gfx942", 64), "gfx950": ("hip", "gfx950", 64), "sm_90": ("cuda", 90, 32)}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.bool: "i1",
}
MATRIX = r"v_mfma|v_smfmac|wgmma\.mma_async|mma\.sync"
# Of several 32-bit words at once: AMD's (lds: to shared memory), NVIDIA's to registers and (16 bytes) to shared memory.
LOADS = (
    r"(?:buffer|global)_load_(?:lds_)?dwordx(\d)|ld\.global[\w.:]*\.v(\d)\.b32"
    r"|cp\.async\.cg\.shared\.global.*0x1(0)"
)
FP8_CONVERSION = r"v_cvt_(?:scalef32_)?pk_(?:fp8|\w+_fp8)|cvt\.rn\.satfinite\.e4m3x2|cvt\.rn\.f16x2\.e4m3x2"


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that a launcher asked for: the kernel, its arguments by name, and the options (num_warps ...)."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel costs on one target.

    Registers are a thread's vector registers, shared memory is LDS, widest_load_bytes what one thread reads at once,
    occupancy how many of the warps that a multiprocessor can hold are there when it holds all programs it has room for.
    """

    op: str
    kernel: str
    case: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    widest_load_bytes: int
    matrix_instructions: int
    fp8_conversions: int
    num_warps: int
    occupancy: float
    problem: str | None


def launches(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Launch]:
    """What a launcher would launch for these arguments (meta tensors will do: it may not look at values)."""
    from triton.runtime.jit import JITFunction

    noted: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args)) | {name: kwargs.pop(name) for name in self.arg_names if name in kwargs}
        noted.append(Launch(self, named, kwargs))

    run, JITFunction.run = JITFunction.run, note
    try:
        function(*arguments)
    finally:
        JITFunction.run = run
    return noted


def compile_op(op_name: str, target: str) -> Iterator[Compiled]:
    """Compiles the op's Triton kernels for the first dtype of bf16, fp16, fp32 that it has, on its cases of real size
    (the last case where it has none), each once.
    """
    op = load_op(op_name)
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    kernels = [load_kernel(op_name, info.name) for info in inventory()[op_name] if info.name in IN_TRITON]
    compiled = set()
    for kernel, (case, arguments) in product(kernels, _cases(op, target, dtype)):
        with assuming(target):
            noted = launches(kernel.function, tuple(kernel.packed(op.parameters, arguments)))
        for launch in noted:
            key = (launch.kernel.__name__, repr(_specialize(launch)), repr(launch.options))
            if key not in compiled:
                compiled.add(key)
                yield _compile(op_name, case.name, launch, target)


def compile_all(op_names: tuple[str, ...] = (), targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[Compiled]:
    """Every op that has a Triton kernel (or those named), for every target."""
    from triton import knobs

    if knobs.runtime.interpret:
        raise AskError("is set, and interpreted kernels cannot be compiled", field="TRITON_INTERPRET", hint="unset it")
    for name in op_names or inventory():
        if any(info.name in IN_TRITON for info in inventory()[name]):
            for target in targets:
                yield from compile_op(name, target)


def _cases(op: Op, target: str, dtype: torch.dtype) -> list[tuple[Case, tuple[Any, ...]]]:
    """The large cases in the target's own FP8 format: the other one compiles to slow emulation, or not at all."""
    foreign = torch.float8_e4m3fn if target == "gfx942" else torch.float8_e4m3fnuz
    made = [(case, case.make(torch.Generator().manual_seed(0), dtype, "meta")) for case in op.cases]
    own = [
        (case, arguments)
        for case, arguments in made
        if foreign not in arguments and foreign not in [getattr(value, "dtype", None) for value in arguments]
    ]
    if not own:
        raise AskError(f"has no case in the FP8 format of {target}", field=f"op {op.name}")
    return [one for one in own if one[0].bench] or own[-1:]


def _compile(op_name: str, case_name: str, launch: Launch, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = _specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, aligned)
    code = triton.compile(source, GPUTarget(*TARGETS[target]), options={"enable_fp_fusion": True, **launch.options})
    text = code.asm["ptx"] if "ptx" in code.asm else code.asm["amdgcn"]
    registers, spills = _ptxas_usage(code.asm["cubin"]) if "cubin" in code.asm else _amdgcn_usage(text)
    matrix = len(re.findall(MATRIX, text))
    problem = f"spills {spills} registers" if spills else None
    if "tt.dot" in code.asm["ttir"] and not matrix:
        problem = "multiplies matrices without matrix instructions"
    return Compiled(
        op=op_name,
        kernel=launch.kernel.__name__,
        case=case_name,
        target=target,
        registers=registers,
        spills=spills,
        shared_bytes=code.metadata.shared,
        widest_load_bytes=max((4 * int(amd or nvidia or 4) for amd, nvidia, _ in re.findall(LOADS, text)), default=4),
        matrix_instructions=matrix,
        fp8_conversions=len(re.findall(FP8_CONVERSION, text)),
        num_warps=code.metadata.num_warps,
        occupancy=round(occupancy(target, registers, code.metadata.shared, code.metadata.num_warps), 2),
        problem=problem,
    )


def occupancy(target: str, registers: int, shared_bytes: int, num_warps: int) -> float:
    """0 to 1. Both vendors hand out registers 8 a thread at a time: an AMD SIMD, of four, has 512 a lane and takes 8
    wavefronts, whatever program they are of; NVIDIA's multiprocessor has 65,536, takes 64 warps and 32 programs, and
    adds 1 KiB of shared memory of its own to each.
    """
    found, given = CHIPS[target], -(-max(registers, 1) // 8) * 8
    if found.is_amd:
        most, by_registers, of_shared = 32, 4 * min(512 // given, 8) // num_warps, found.shared_bytes
    else:
        most, by_registers = 64, min(65536 // (LANES * given * num_warps), 64 // num_warps, 32)
        of_shared, shared_bytes = found.shared_bytes + 1024, shared_bytes + 1024
    return min(by_registers, of_shared // max(shared_bytes, 1)) * num_warps / most


def _specialize(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Triton's own rules: the signature by name, the constants, and which arguments are divisible by 16."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for idx, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        fixed = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or fixed:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            aligned[(idx,)] = [["tt.divisibility", 16]]  # allocations are
        elif isinstance(value, TensorDescriptor):
            tile = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{tile}]>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[(idx,)] = [["tt.divisibility", 16]]
    return signature, constants, aligned


def _amdgcn_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled registers) from the metadata that closes an AMD assembly file."""
    counts = {name: int(count) for name, count in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"]


def _ptxas_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes / 4) as cuobjdump, which Triton brings along, reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], (usage["STACK"] + usage["LOCAL"]) // 4
