"""write_latent in Triton: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deepserve.ops.launch import next_power_of_two, num_warps
from deepserve.ops.op import Kernel
from deepserve.ops.overlap import overlap, wait


@triton.jit
def _write_latent_kernel(
    latent, cache, slot_mapping, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + token)
    entry = tl.load(latent + token * row_stride + channel, channel < WIDTH)
    tl.store(cache + slot * WIDTH + channel, entry.to(cache.dtype.element_ty), channel < WIDTH)


def write_latent(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """See spec.py."""
    num_tokens, width = latent.shape
    block = next_power_of_two(width)
    _write_latent_kernel[(num_tokens,)](
        latent, cache, slot_mapping, latent.stride(0), width, block, num_warps=num_warps(block),
        **overlap(latent.device),
    )  # fmt: skip
    return cache


KERNEL = Kernel("write_latent", "triton", write_latent)
