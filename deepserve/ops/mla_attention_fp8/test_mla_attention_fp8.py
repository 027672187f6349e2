"""What the cases cannot say of latent attention over FP8: it is that over the dequantised cache."""

import pytest
import torch

from deepserve.ops.load import load_kernel
from deepserve.ops.mla_attention_fp8.spec import mla_attention_fp8
from deepserve.ops.write_latent_fp8.spec import read_latents

SMALL = [case for case in mla_attention_fp8.cases if not case.bench]


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_it_is_attention_over_the_dequantised_cache_to_the_bit(case, dtype, kernel) -> None:
    """Scales are powers of two: even in bf16 dequantising loses nothing."""
    arguments = case.make(torch.Generator().manual_seed(1), dtype, "cpu")
    q_nope, q_rope, cache, w_uk, w_uv, batch, scale, fp8 = arguments
    latents, k_rope = read_latents(cache.flatten(0, 1), w_uk.shape[2], q_rope.shape[2], dtype, fp8)
    plain = torch.cat((latents.to(dtype), k_rope), -1).view(*cache.shape[:2], -1)
    batch.derived.clear()
    expected = load_kernel("mla_attention", kernel).function(q_nope, q_rope, plain, w_uk, w_uv, batch, scale)
    batch.derived.clear()
    assert torch.equal(load_kernel("mla_attention_fp8", kernel).function(*arguments), expected)
