"""Contexts too long to be expanded at once: each slice is attended to, and the results are merged."""

import pytest
import torch

from deepserve.ops.load import load_kernel, load_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tokens", [16, 50, 200])
@pytest.mark.parametrize("name", ["long", "mixed", "chunks"])
def test_slices_are_merged(name, tokens, seed, monkeypatch):
    contract, kernel = load_op("mla_attention"), load_kernel("mla_attention", "triton")
    case = next(case for case in contract.cases if case.name == name)
    arguments = case.make(torch.Generator().manual_seed(seed), torch.float32, DEVICE)
    heads, v_dim, _ = arguments[4].shape
    bytes_per_token = 4 * heads * (arguments[3].shape[1] + v_dim)
    monkeypatch.setitem(kernel.function.__globals__, "EXPANDED_BYTES", tokens * bytes_per_token)
    expected, actual = contract.reference(*arguments), kernel.function(*arguments)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
