"""The gated activation of SwiGLU."""

from deepserve.ops.inventory import REFERENCE

KERNELS = (REFERENCE,)
