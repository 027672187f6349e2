"""Grouped-query attention over a paged cache."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu, "tolerance"))
