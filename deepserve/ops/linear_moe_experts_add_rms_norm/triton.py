"""linear_moe_experts_add_rms_norm in Triton: with a few tokens the router's product, too small for a chip, is computed
beside the first product of the shared experts, which wait for no router."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import chip
from deepserve.ops.linear_moe_route.triton import linear_moe_route, logits_tile, pack, part_sizes
from deepserve.ops.moe_experts.triton import expert_rows, gate_up_tile
from deepserve.ops.moe_experts_add_rms_norm.triton import moe_experts_add_rms_norm, sum_add_rms_norm
from deepserve.ops.moe_route.triton import route
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait

FEW_TOKENS = 16
COLUMNS, CHANNELS = 16, 128  # of a tile of the router's product
SHARED_COLUMNS, SHARED_CHANNELS = 16, 128  # of one of the shared experts', of which there are few


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_gate_up_kernel(
    x,  # [T, HIDDEN] at row stride x_stride
    router,  # bf16 [3, EXPERTS, HIDDEN]
    logits,  # fp32 [parts, T, EXPERTS]
    shared_weight,  # [2 * SHARED * WIDTH, HIDDEN], gates first
    hidden,  # [T * (TOP_K + SHARED), WIDTH]
    num_tokens,
    x_stride,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,  # channels of a program of the router
    M: tl.constexpr,
    ROUTER_N: tl.constexpr,
    ROUTER_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    BLOCKS: tl.constexpr = (EXPERTS + ROUTER_N - 1) // ROUTER_N
    ROUTERS: tl.constexpr = BLOCKS * ((HIDDEN + PART - 1) // PART)
    PARTS: tl.constexpr = (WIDTH + N - 1) // N
    program = tl.program_id(0)
    row = tl.arange(0, M)
    if program < ROUTERS:
        column = program % BLOCKS * ROUTER_N + tl.arange(0, ROUTER_N)
        logits_tile(
            x, router, logits, row.to(tl.int64), column, program // BLOCKS, num_tokens, x_stride,
            HIDDEN, EXPERTS, PART, M, ROUTER_N, ROUTER_K,
        )  # fmt: skip
    else:
        shared, part = (program - ROUTERS) // PARTS, (program - ROUTERS) % PARTS
        is_row = row < num_tokens
        flat = tl.where(is_row, (TOP_K + shared) * num_tokens + row, num_tokens * TOP_K)
        gate_up_tile(
            x, shared_weight, None, shared_weight, hidden, (EXPERTS + shared).to(tl.int64), flat, flat, is_row, part,
            num_tokens, x_stride, TOP_K, EXPERTS, SHARED, HIDDEN, WIDTH, M, N, K, None,
        )  # fmt: skip


def linear_moe_experts_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    scoring: str,
    selection: str,
    renormalize: bool,
    factor: float,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    limit: float | None,
    shared_gate_up: torch.Tensor,
    shared_down: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See spec.py; weight is packed as linear_moe_route's."""
    routing = num_groups, top_k_groups, scoring, selection, renormalize, factor
    num_tokens, (num_experts, size, width) = len(x), w_down.shape
    if num_tokens > FEW_TOKENS or limit is not None or x.element_size() > 2:
        weights, ids = linear_moe_route(x, weight, bias, top_k, *routing)
        return moe_experts_add_rms_norm(
            x, w_gate_up, w_down, weights, ids, limit, shared_gate_up, shared_down, residual, norm_weight, eps, out
        )
    num_shared, found = shared_down.shape[1] // width, chip(x.device)
    blocks = triton.cdiv(num_experts, COLUMNS)
    parts, part = part_sizes(blocks, size, CHANNELS, found.num_multiprocessors)
    logits = torch.empty((parts, num_tokens, num_experts), dtype=torch.float32, device=x.device)
    hidden = torch.empty((num_tokens * (top_k + num_shared), width), dtype=x.dtype, device=x.device)
    _logits_gate_up_kernel[(blocks * parts + num_shared * triton.cdiv(width, SHARED_COLUMNS),)](
        x, weight, logits, shared_gate_up, hidden, num_tokens, x.stride(0), top_k, num_experts, num_shared, size, width,
        part, FEW_TOKENS, COLUMNS, CHANNELS, SHARED_COLUMNS, SHARED_CHANNELS, num_warps=4,
        num_stages=2 if found.is_amd else 4, **overlap(x.device),
    )  # fmt: skip
    weights, ids = route(logits, bias, top_k, *routing)
    y = expert_rows(x, (w_gate_up, w_down), ids, None, (shared_gate_up, shared_down), hidden)
    return sum_add_rms_norm(y, None, weights, num_shared, (residual, norm_weight, eps), out)


KERNEL = Kernel("linear_moe_experts_add_rms_norm", "triton", linear_moe_experts_add_rms_norm, {"weight": pack})
