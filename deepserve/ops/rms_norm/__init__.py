"""Root-mean-square normalisation."""

from deepserve.ops.inventory import REFERENCE

KERNELS = (REFERENCE,)
