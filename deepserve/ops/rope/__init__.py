"""Rotary position embedding."""

from deepserve.ops.inventory import REFERENCE

KERNELS = (REFERENCE,)
