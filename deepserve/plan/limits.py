"""What the hardware allows at best: the time to read what a decode step must read (nothing is measured)."""

from __future__ import annotations

from deepserve.plan.parameters import matrices, rank_bytes, routed_share
from deepserve.plan.plan import Plan


def decode_bound(plan: Plan, num_requests: int, context: int) -> float:
    """Tokens a second that no engine can exceed while `num_requests` decode at `context` tokens: bytes over bandwidth.

    Each rank reads its weights (of the experts, the expected share that independent routing touches) and its cache.
    0 where the bandwidth is not known.
    """
    if not plan.hardware.bandwidth:
        return 0.0
    architecture, moe = plan.architecture, plan.architecture.moe
    read = num_requests * context * plan.memory.kv_bytes_per_token
    for matrix in matrices(architecture):
        if matrix.kind == "embedding" and not architecture.tie_word_embeddings:
            continue
        share = routed_share(moe, num_requests) if moe is not None and matrix.kind == "routed" else 1.0
        keep_fp8 = plan.optimizations["fp8_linear"]
        read += int(share * rank_bytes(matrix, architecture, plan.dtype, plan.tensor_parallel_size, keep_fp8))
    return num_requests * plan.hardware.bandwidth / read
