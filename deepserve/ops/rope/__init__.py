"""Rotary position embedding."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("tolerance"))
