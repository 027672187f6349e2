"""Rows of the embedding table."""

from deepserve.ops.inventory import REFERENCE

KERNELS = (REFERENCE,)
