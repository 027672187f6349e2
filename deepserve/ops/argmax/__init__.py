"""The most likely token of each row."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("bitwise"))
