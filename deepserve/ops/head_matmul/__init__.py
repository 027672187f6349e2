"""Logits in fp32."""

from deepserve.ops.inventory import INVARIANT, REFERENCE, KernelInfo, triton
from deepserve.ops.linear import needs_onednn
from deepserve.ops.native import NATIVE

KERNELS = (REFERENCE, KernelInfo("onednn", "onednn", needs_onednn, "tolerance"), triton("tolerance"), NATIVE, INVARIANT)
