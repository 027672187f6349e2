"""The routed experts of a mixture."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu, "tolerance"))
