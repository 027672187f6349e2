"""Writes K and V rows to their cache slots."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("bitwise"))
