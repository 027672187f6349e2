"""Writes the compressed latents of MLA to their cache slots."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("bitwise"))
