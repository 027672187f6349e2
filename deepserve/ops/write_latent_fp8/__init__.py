"""Writes the compressed latents of MLA to their cache slots in FP8, with a scale each."""

from deepserve.ops.inventory import REFERENCE

KERNELS = (REFERENCE,)
