"""A token drawn from each row's distribution, after min-p, top-k and top-p."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu, triton

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu), triton("bitwise"))
