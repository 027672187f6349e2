"""Logits in fp32."""

from deepserve.ops.inventory import REFERENCE, KernelInfo, a_cpu

KERNELS = (REFERENCE, KernelInfo("onednn", "onednn", a_cpu, "tolerance"))
