"""Probabilities of each row at its temperature."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("tolerance"))
