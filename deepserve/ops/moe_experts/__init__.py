"""The routed experts of a mixture: each token through its own, weighed and summed."""

from deepserve.ops.inventory import INVARIANT, REFERENCE, KernelInfo, triton
from deepserve.ops.linear import needs_onednn
from deepserve.ops.native import NATIVE

KERNELS = (REFERENCE, KernelInfo("cpu", "cpu", needs_onednn, "tolerance"), NATIVE, triton("tolerance"), INVARIANT)
