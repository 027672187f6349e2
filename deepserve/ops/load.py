"""Imports an op or a kernel by its name in the inventory; from here on there is torch."""

from __future__ import annotations

import importlib

from deepserve.errors import AskError
from deepserve.ops.inventory import inventory
from deepserve.ops.op import Kernel, Op


def load_op(op_name: str) -> Op:
    """The op itself (imports torch)."""
    if op_name not in inventory():
        raise AskError(f"there is no op {op_name!r}", field="op", hint=f"ops: {', '.join(inventory())}")
    op: Op = getattr(importlib.import_module(f"deepserve.ops.{op_name}.spec"), op_name)
    return op


def load_kernel(op_name: str, kernel_name: str) -> Kernel:
    """Imports one kernel (and torch, and whatever the kernel binds). AskError where the room has none of that name."""
    op = load_op(op_name)
    for info in inventory()[op_name]:
        if info.name == kernel_name:
            if info.module is None:
                return Kernel(op_name, info.name, op.reference)
            kernel: Kernel = importlib.import_module(f"deepserve.ops.{op_name}.{info.module}").KERNEL
            return kernel
    names = ", ".join(info.name for info in inventory()[op_name])
    raise AskError(f"there is no kernel {kernel_name!r}", field=f"op {op_name}", hint=f"kernels: {names}")
