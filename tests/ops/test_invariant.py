"""Kernels that are the same bits whatever the batch: rows alone and among many, on a GPU (an interpreter's sums are
numpy's, whose order is not ours)."""

import pytest
import torch

from deepserve.hardware import this_machine
from deepserve.ops.load import load_kernel
from deepserve.ops.paged import make_batch
from deepserve.ops.write_latent_fp8.spec import fp8_cache

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the order of sums is that of a GPU's instructions"
)

COUNTS = (1, 2, 5, 16, 17, 33, 64, 100, 129, 700, 1025, 3000)


def normal(generator, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=generator).to("cuda", dtype)


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_same_rows(compute, total):
    """compute(first, last) -> rows: the same bits for every window that begins at 0, or ends at the last."""
    whole = compute(0, total)
    assert torch.isfinite(whole).all()
    for count in COUNTS:
        if count <= total:
            assert torch.equal(compute(0, count), whole[:count]), count
            assert torch.equal(compute(total - count, total), whole[total - count :]), count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["linear", "head_matmul"])
def test_products(op, dtype, generator):
    x, weight = normal(generator, 3000, 2048, dtype=dtype), normal(generator, 1216, 2048, dtype=dtype)
    bias = (normal(generator, 1216, dtype=dtype),) if op == "linear" else ()
    function = load_kernel(op, "invariant").function
    assert_same_rows(lambda first, last: function(x[first:last], weight, *bias), 3000)


def test_experts(generator):
    x, ids = normal(generator, 3000, 512), torch.rand(3000, 48, generator=generator).topk(6).indices.cuda()
    weights = torch.rand(3000, 6, generator=generator).cuda()
    gate_up, down = normal(generator, 48, 768, 512) * 0.04, normal(generator, 48, 512, 384) * 0.05
    function = load_kernel("moe_experts", "invariant").function
    assert_same_rows(
        lambda first, last: function(x[first:last], gate_up, down, weights[first:last], ids[first:last], None), 3000
    )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_routes(scoring, generator):
    logits = normal(generator, 3000, 64, dtype=torch.float32)
    function = load_kernel("moe_route", "triton").function
    arguments = (None, 6, 1, 1, scoring, "greedy", True, 1.0)
    assert_same_rows(lambda first, last: torch.cat(function(logits[first:last], *arguments), 1), 3000)


@pytest.mark.parametrize("op", ["write_latent_fp8", "rms_norm_rope_write_latent", "rms_norm_rope_write_latent_fp8"])
def test_latents(op, generator):
    a, weight = normal(generator, 3000, 32 + 512 + 64), normal(generator, 512)
    positions, angles = torch.randint(50, (3000,), generator=generator).cuda(), torch.rand(50, 64).cuda()
    own = torch.float8_e4m3fnuz if this_machine().arch == "gfx942" else torch.float8_e4m3fn
    fp8 = (own,) if op.endswith("fp8") else ()
    function = load_kernel(op, "triton").function

    def compute(first, last):
        slots, latent, key = torch.arange(last - first).cuda(), a[first:last, 32:544], a[first:last, 544:]
        cache = fp8_cache(188, 16, 512, 128, "cuda").zero_() if fp8 else torch.zeros(188, 16, 576).to(a)
        rest = cache, slots, *fp8
        if op == "write_latent_fp8":
            function(latent, key, *rest)
        else:
            function(latent, weight, 1e-6, key.unsqueeze(1), positions[first:last], angles, True, *rest)
        return cache.view(3008, -1)[slots]

    assert_same_rows(compute, 3000)


@pytest.mark.parametrize("op", ["mla_attention", "gqa_attention"])
def test_attention(op, generator):
    """A context's last tokens: as one prompt, as two chunks, and each as a row, alone and beside others."""
    length, new = 777, 300
    function = load_kernel(op, "invariant").function
    whole, num_blocks = make_batch([5, new], [90, length], 64, generator, "cuda")
    first, _ = make_batch([new - 120], [length - 120], 64, generator, "cuda")
    second, _ = make_batch([120], [length], 64, generator, "cuda")
    rows, _ = make_batch([1] * 70, list(range(length - 69, length + 1)), 64, generator, "cuda")
    alone, _ = make_batch([1], [length], 64, generator, "cuda")
    table = whole.block_table[1:, : -(-length // 64)]
    for batch in (first, second, rows, alone):  # all of them the same cache
        batch.block_table.copy_(table[:, : batch.block_table.shape[1]].expand_as(batch.block_table))
    q = normal(generator, 5 + new, 16, 192)
    if op == "mla_attention":
        cache = normal(generator, num_blocks, 64, 576)
        w_uk, w_uv = normal(generator, 16, 128, 512) * 0.05, normal(generator, 16, 128, 512) * 0.05

        def compute(queries, batch):
            return function(queries[..., :128], queries[..., 128:], cache, w_uk, w_uv, batch, 0.1)
    else:
        cache = normal(generator, num_blocks, 2, 64, 4, 192)

        def compute(queries, batch):
            return function(queries, cache, batch, 0.1, None)

    expected = compute(q, whole)[5:]
    assert torch.isfinite(expected).all()
    assert torch.equal(compute(q[5:-120], first), expected[:-120])
    assert torch.equal(compute(q[-120:], second), expected[-120:])
    assert torch.equal(compute(q[-70:], rows), expected[-70:])
    assert torch.equal(compute(q[-1:], alone), expected[-1:])
