"""Of routing, what the cases cannot say: a token whose logits are no numbers still has experts, all of them different.

Sorting tokens by expert relies on it: one token must not make another's rows unwritten.
"""

import pytest
import torch

from deepserve.ops.load import load_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BROKEN = {"all": slice(None), "one": slice(3, 4), "most": slice(2, None)}


@pytest.mark.parametrize("selection, groups, kept", [("greedy", 1, 1), ("group_max", 4, 2), ("group_top2", 4, 2)])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_experts_of_broken_logits_are_different_ones(scoring, selection, groups, kept, value):
    if DEVICE == "cpu" and selection != "greedy":
        pytest.skip("the interpreter refuses the largest of NaN alone")
    logits = torch.randn(len(BROKEN) + 1, 32, device=DEVICE)
    for row, columns in enumerate(BROKEN.values()):
        logits[row, columns] = value
    bias = torch.randn(32, device=DEVICE) if selection == "group_top2" else None
    route = load_kernel("moe_route", "triton").function
    weights, ids = route(logits, bias, 6, groups, kept, scoring, selection, True, 1.0)
    for row in ids.tolist():
        assert len(set(row)) == 6 and min(row) >= 0 and max(row) < 32
    assert torch.isfinite(weights[-1]).all()
