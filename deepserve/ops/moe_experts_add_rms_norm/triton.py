"""moe_experts' products with the shared experts among them, then one pass: weighted sum, residual, norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.moe_experts.triton import MAX_CHOICES, expert_rows
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait
from deepserve.ops.silu_mul.triton import silu_mul

MANY_TOKENS = 32  # from here on the shared experts are better off as dense products of their own


@triton.jit
def _moe_sum_add_rms_norm_kernel(
    y,  # [T * (TOP_K + SHARED), SIZE]
    shared,  # [T, SIZE] or None
    weights,  # fp32 [T, TOP_K]
    residual,  # [T, SIZE]
    gain,
    normed_out,
    residual_out,
    eps,
    residual_stride,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    token, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channel = tl.arange(0, BLOCK)
    mask = channel < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(y + (token * TOP_K + k) * SIZE + channel, mask, 0.0).to(tl.float32)
        total += row * tl.load(weights + token * TOP_K + k)
    for one in tl.static_range(SHARED):
        row = num_tokens.to(tl.int64) * (TOP_K + one) + token
        total += tl.load(y + row * SIZE + channel, mask, 0.0).to(tl.float32)
    if shared is not None:
        total += tl.load(shared + token * SIZE + channel, mask, 0.0).to(tl.float32)
    old = tl.load(residual + token * residual_stride + channel, mask, 0.0).to(tl.float32)
    total = (total + old).to(residual_out.dtype.element_ty)  # rounded before it is normalised, as when separate
    tl.store(residual_out + token * SIZE + channel, total, mask)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(normed_out.dtype.element_ty).to(tl.float32)
    normed = normed * tl.load(gain + channel, mask, 0.0).to(tl.float32)
    tl.store(normed_out + token * SIZE + channel, normed.to(normed_out.dtype.element_ty), mask)


def moe_experts_add_rms_norm(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    limit: float | None,
    shared_gate_up: torch.Tensor,
    shared_down: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py. shared experts are as wide as routed ones, or a multiple."""
    (num_tokens, size), top_k = x.shape, ids.shape[1]
    normed, total = out or (torch.empty((num_tokens, size), dtype=x.dtype, device=x.device) for _ in range(2))
    # The limit is the routed experts'.
    apart = num_tokens >= MANY_TOKENS or ids.numel() > MAX_CHOICES or limit is not None
    dense = silu_mul(x @ shared_gate_up.t()) @ shared_down.t() if apart else None
    y = expert_rows(x, (w_gate_up, w_down), ids, limit, None if apart else (shared_gate_up, shared_down))
    block = next_power_of_two(size)
    num_shared = 0 if apart else shared_down.shape[1] // w_down.shape[2]
    _moe_sum_add_rms_norm_kernel[(num_tokens,)](
        y, dense, weights, residual, norm_weight, normed, total, eps, residual.stride(0), top_k, num_shared, size,
        block, num_warps=min(2 * num_warps(block), 16), **overlap(x.device),
    )  # fmt: skip
    return normed, total


KERNEL = Kernel("moe_experts_add_rms_norm", "triton", moe_experts_add_rms_norm)
