"""Matrix product of FP8 activations and FP8 weights with block scales."""

from deepserve.ops.inventory import REFERENCE

KERNELS = (REFERENCE,)
