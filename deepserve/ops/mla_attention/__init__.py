"""Multi-head latent attention over a paged cache of latents."""

from deepserve.ops.inventory import INVARIANT, REFERENCE, KernelInfo, a_cpu, triton
from deepserve.ops.native import NATIVE

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu, "tolerance"), NATIVE, triton("tolerance"), INVARIANT)
