"""RMS normalisation and FP8 quantisation in one pass."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("tolerance"))
