"""Router, experts, residual addition and norm: the second half of a layer."""

from deepserve.ops.inventory import REFERENCE, triton

KERNELS = (REFERENCE, triton("tolerance"))
