"""Matrix product with a weight, the hot path of everything."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu

KERNELS = (REFERENCE, KernelInfo("onednn", "onednn", a_cpu, "tolerance"))
