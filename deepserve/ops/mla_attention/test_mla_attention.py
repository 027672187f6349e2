"""What the cases cannot say of latent attention."""

import pytest
import torch

from deepserve.ops.mla_attention import cpu
from deepserve.ops.mla_attention.spec import mla_attention


def make(name, dtype=torch.float32):
    case = next(case for case in mla_attention.cases if case.name == name)
    return case.make(torch.Generator().manual_seed(1), dtype, "cpu")


@pytest.mark.parametrize("heads", [1, 3])
def test_long_rows_a_few_heads_at_a_time(heads, monkeypatch):
    arguments = make("long")
    expected = mla_attention(*arguments)
    longest = max(arguments[5].context_lens)
    monkeypatch.setattr(cpu, "LONG_BYTES", heads * 2 * longest * 24 * 4)
    torch.testing.assert_close(cpu.function(*arguments), expected, rtol=2e-5, atol=2e-5)


def test_absorbed_and_naive_are_the_same_numbers():
    q_nope, q_rope, cache, w_uk, w_uv, batch, scale = make("single")
    absorbed = mla_attention(q_nope, q_rope, cache, w_uk, w_uv, batch, scale)
    batch.num_single = 0
    naive = mla_attention(q_nope, q_rope, cache, w_uk, w_uv, batch, scale)
    torch.testing.assert_close(absorbed, naive, rtol=2e-5, atol=2e-5)
    assert not torch.equal(absorbed, naive)
