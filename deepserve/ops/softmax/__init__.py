"""Probabilities of each row at its temperature."""

from deepserve.ops.inventory import REFERENCE

KERNELS = (REFERENCE,)
