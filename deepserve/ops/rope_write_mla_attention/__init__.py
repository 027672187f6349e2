"""Latent attention with what comes before it: rotation, absorption, and the token's own cache entry."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("tolerance"))
