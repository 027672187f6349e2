"""Multi-head latent attention over a cache in FP8: every head reads one cached latent a token, and its scale."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deepserve.ops.mla_attention.spec import Shape, attend, cost_of, make_case
from deepserve.ops.op import Case, Cost, op
from deepserve.ops.quant_fp8.spec import FP8
from deepserve.ops.write_latent_fp8.spec import fp8_cache, read_latents, write_latent_fp8
from deepserve.runner.batch import Batch


def _store(
    entries: torch.Tensor, rank: int, slots: torch.Tensor, blocks: tuple[int, int], fp8: torch.dtype
) -> torch.Tensor:
    latent, k_rope = entries[:, :rank], entries[:, rank:]
    cache = fp8_cache(*blocks, rank, k_rope.shape[1] * k_rope.element_size(), str(entries.device))
    return write_latent_fp8.reference(latent, k_rope, cache, slots, fp8)


def _case(name: str, queries: list[int], contexts: list[int], shape: Shape, fp8: torch.dtype = FP8[0]) -> Case:
    name = f"{name}-{fp8}".replace("torch.", "")
    return replace(make_case(name, queries, contexts, shape, partial(_store, fp8=fp8), (fp8,)), fp8=fp8)


def _cost(q_nope: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, *rest: Any) -> Cost:
    w_uk, w_uv, batch, *_ = rest
    entry_bytes = w_uk.shape[2] + q_rope.shape[2] * q_rope.element_size() + 4
    return cost_of(q_nope, q_rope, entry_bytes, w_uk, w_uv, batch)


@op(
    cases=(
        _case("single", [1, 1, 1], [1, 17, 40], (4, 16, 8, 32, 24, 4)),
        _case("long", [7, 33], [7, 50], (4, 16, 8, 32, 24, 16)),
        _case("long", [7, 33], [7, 50], (4, 16, 8, 32, 24, 16), FP8[1]),
        _case("mixed", [1, 1, 5, 20], [3, 64, 9, 20], (2, 32, 16, 64, 16, 8)),
        _case("chunks", [1, 300, 130], [9, 420, 130], (2, 16, 8, 32, 24, 16)),
        _case("decode_40", [1] * 40, [i * 7 % 120 + 1 for i in range(40)], (4, 16, 64, 256, 16, 16)),
        _case("decode_40", [1] * 40, [i * 7 % 120 + 1 for i in range(40)], (4, 16, 64, 256, 16, 16), FP8[1]),
        *(
            _case(name, queries, contexts, (16, 128, 64, 512, 128, 64), fp8)
            for fp8 in FP8
            for name, queries, contexts in (
                ("decode_1_4096", [1], [4096]),
                ("decode_32_4096", [1] * 32, [4096] * 32),
                ("prefill_4096", [1024, 1024], [1024, 4096]),
                ("decode_32", [1] * 32, [64 * (i + 1) for i in range(32)]),
            )
        ),
    ),
    tolerance={torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)},
    cost=_cost,
)
def mla_attention_fp8(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    batch: Batch,
    scale: float,
    fp8: torch.dtype,
) -> torch.Tensor:
    """q_nope [T, N, nope], q_rope [T, N, P] (rotated), cache uint8 [num_blocks, block_size, entry bytes]
    (write_latent_fp8's layout: the normed latent c [R] in `fp8`, the rotated k_rope [P] in q_rope's dtype, c's scale),
    w_uk [N, nope, R], w_uv [N, v, R] -> [T, N, v]: mla_attention on the dequantised entries.

    A kernel need not multiply c with its scale, which is one for the whole entry: it can multiply scores and
    probabilities. Slots that belong to no request are never read: their bytes may be NaN.
    """
    rows, rank, rope_dim = cache.flatten(0, 1), w_uk.shape[2], q_rope.shape[2]

    def read(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return read_latents(rows[slots], rank, rope_dim, q_rope.dtype, fp8)

    return attend(q_nope, q_rope, read, w_uk, w_uv, batch, scale)
