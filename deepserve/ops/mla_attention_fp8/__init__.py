"""Multi-head latent attention over a paged cache of latents in FP8."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", a_cpu, "tolerance"))
