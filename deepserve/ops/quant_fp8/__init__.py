"""Dynamic FP8 quantisation of activations, one scale a token and group of channels."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("bitwise"))
