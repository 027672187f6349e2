"""What MLA stores of a token in FP8, from the projection to the cache in one pass."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu, "tolerance"))
