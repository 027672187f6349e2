"""Rows of the embedding table."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("bitwise"))
