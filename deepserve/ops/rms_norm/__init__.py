"""Root-mean-square normalisation."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("tolerance"))
