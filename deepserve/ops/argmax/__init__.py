"""The most likely token of each row, and its logit."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu, triton

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu), triton("bitwise"))
