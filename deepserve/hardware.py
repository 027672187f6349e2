"""What a machine can do, as plain numbers: a table of known devices, and the machine that this runs on."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepserve.errors import AskError

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of device and how many of them one machine has. Memory and bandwidth are those of one device.

    kind: cpu, cuda (NVIDIA) or hip (AMD). bandwidth is bytes/s, flops the dense peak by dtype (both as the vendor
    states them; 0 or absent: not known). free_bytes is what other programs leave (None: all of it).
    """

    name: str
    kind: str
    arch: str  # gfx942, gfx950, sm_90, sm_100, x86_64, aarch64
    memory_bytes: int
    bandwidth: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    count: int = 1
    features: frozenset[str] = frozenset()  # CPU instruction sets that decide a dtype or a kernel
    tools: frozenset[str] = frozenset()  # CPU: of gcc and torch's libgomp, those that are here
    num_cores: int = 0  # CPU: physical cores that this process may use
    free_bytes: int | None = None

    @property
    def device(self) -> str:
        """What torch calls it: cpu or cuda."""
        return "cpu" if self.kind == "cpu" else "cuda"

    @property
    def fp8_format(self) -> str:
        """The FP8 that it has instructions for, by the plan's name (a CPU has none, and takes the common one)."""
        return "fp8_e4m3fnuz" if self.arch == "gfx942" else "fp8_e4m3fn"

    @property
    def available_bytes(self) -> int:
        """Bytes of one device that can be had now."""
        return self.memory_bytes if self.free_bytes is None else min(self.free_bytes, self.memory_bytes)

    @property
    def label(self) -> str:
        """Its name with the count, as in 8 x MI300X."""
        return self.name if self.count == 1 else f"{self.count} x {self.name}"


def _gpu(name: str, kind: str, arch: str, gib: float, terabytes_s: float, *teraflops: float) -> Hardware:
    """teraflops: dense bf16 (= fp16), then fp8."""
    bf16, fp8 = (number * 1e12 for number in teraflops)
    return Hardware(name, kind, arch, int(gib * GIB), terabytes_s * 1e12, {"bf16": bf16, "fp16": bf16, "fp8": fp8})


# Memory as the drivers report it (a 192 GB MI300X has 192 GiB, an 80 GB H100 79.6), rates as data sheets state them.
TABLE = {
    "mi300x": _gpu("MI300X", "hip", "gfx942", 191.7, 5.3, 1307, 2615),
    "mi325x": _gpu("MI325X", "hip", "gfx942", 255.7, 6.0, 1307, 2615),
    "mi350x": _gpu("MI350X", "hip", "gfx950", 287.7, 8.0, 2307, 4614),
    "mi355x": _gpu("MI355X", "hip", "gfx950", 287.7, 8.0, 2516, 5033),
    "h100": _gpu("H100", "cuda", "sm_90", 79.6, 3.35, 989, 1979),
    "h200": _gpu("H200", "cuda", "sm_90", 140.4, 4.8, 989, 1979),
    "b200": _gpu("B200", "cuda", "sm_100", 179.1, 8.0, 2250, 4500),
}


def parse_hardware(text: str) -> Hardware:
    """`mi300x`, `mi300x:8`, `8xMI300X` or `cpu` (this machine's). AskError on anything else."""
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([a-z]+\d*[a-z]*?)(?::(\d+))?", text.strip().lower())
    before, name, after = found.groups() if found else (None, "", None)
    if name == "cpu" and not before and not after:
        return this_cpu()
    if name not in TABLE or (before and after):
        raise AskError(f"{text!r} is not known", field="hardware", hint=f"{', '.join(TABLE)} or cpu, as in mi300x:8")
    count = int(before or after or 1)
    if not 1 <= count <= 1024:
        raise AskError(f"{count} devices, expected 1 to 1024", field="hardware")
    return dataclasses.replace(TABLE[name], count=count)


def this_machine() -> Hardware:
    """The GPUs of this machine if torch can use them, else its CPU."""
    if any(Path(node).exists() for node in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")):
        import torch

        if torch.cuda.is_available():
            return _from_torch(torch)
    return this_cpu()


def _from_torch(torch) -> Hardware:
    properties = torch.cuda.get_device_properties(0)
    is_hip = torch.version.hip is not None
    arch = architecture(properties, is_hip)
    free, total = torch.cuda.mem_get_info(0)
    unknown = Hardware(properties.name, "hip" if is_hip else "cuda", arch, total)
    base = TABLE.get(gpu_name(properties.name, arch), unknown)
    return dataclasses.replace(base, memory_bytes=total, free_bytes=free, count=torch.cuda.device_count())


def architecture(properties: Any, is_hip: bool) -> str:
    """The architecture of a GPU, as in gfx942 or sm_90, by what torch says of it."""
    return properties.gcnArchName.split(":")[0] if is_hip else f"sm_{properties.major}{properties.minor}"


def gpu_name(name: str, arch: str) -> str:
    """What files about a GPU are called: its key in TABLE, else its driver's name in small letters and dashes."""
    known = (key for key, row in TABLE.items() if row.arch == arch and key in name.lower())
    return next(known, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))


def this_cpu(read: Callable[[str], str] | None = None) -> Hardware:
    """This machine's CPU from /proc and the limits of its cgroup. `read` gives a file's text, empty for none."""
    read = read or _read
    info = read("/proc/cpuinfo")
    flags = set(_line(info, "flags").split()) | set(_line(info, "Features").split())
    wanted = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16"}
    total, free = (_meminfo(read("/proc/meminfo"), key) for key in ("MemTotal", "MemAvailable"))
    limit, used = read("/sys/fs/cgroup/memory.max").strip(), read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        free = min(free, total - int(used or 0))
    return Hardware(
        name=_line(info, "model name") or "CPU",
        kind="cpu",
        arch=os.uname().machine,
        memory_bytes=total,
        features=frozenset(flags & wanted),
        tools=frozenset(({"gcc"} if shutil.which("gcc") else set()) | ({"libgomp"} if torch_openmp() else set())),
        num_cores=_usable_cores(info, read("/sys/fs/cgroup/cpu.max")),
        free_bytes=max(free, 0),
    )


def torch_openmp() -> Path | None:
    """The libgomp that torch's wheels for Linux bring along, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((file for folder in folders for file in sorted(Path(folder, "lib").glob("libgomp*.so*"))), None)


def _usable_cores(info: str, quota: str) -> int:
    """Physical cores among the CPUs that this process may run on, and no more than its cgroup's quota."""
    allowed, cores = os.sched_getaffinity(0), set()
    for entry in info.split("\n\n"):
        number = _line(entry, "processor")
        if number.isdigit() and int(number) in allowed:
            core = _line(entry, "core id")
            cores.add((_line(entry, "physical id"), core) if core else number)
    usable = len(cores) or len(allowed)
    parts = quota.split()
    if len(parts) == 2 and parts[0].isdigit():
        usable = min(usable, max(1, int(parts[0]) // int(parts[1])))
    return usable


def _meminfo(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.M)
    return int(found.group(1)) * 1024 if found else 0


def _line(text: str, key: str) -> str:
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.M)
    return found.group(1).strip() if found else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
