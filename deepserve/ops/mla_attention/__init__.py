"""Multi-head latent attention over a paged cache of latents."""

from deepserve.ops.inventory import INVARIANT, REFERENCE, KernelInfo, a_cpu, triton
from deepserve.ops.native import NATIVE

LARGEST_RANK = 512  # channels of a latent that a GPU's program multiplies in one go
KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu, "tolerance"), NATIVE, triton("tolerance"), INVARIANT)
