"""Logits in fp32."""

from deepserve.ops.inventory import REFERENCE, KernelInfo
from deepserve.ops.linear import needs_onednn

KERNELS = (REFERENCE, KernelInfo("onednn", "onednn", needs_onednn, "tolerance"))
