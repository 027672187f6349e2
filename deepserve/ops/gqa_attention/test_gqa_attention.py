"""What the cases cannot say of grouped-query attention on a CPU: that they reach every path, and how decodes group."""

import torch

from deepserve.ops import paged
from deepserve.ops.gqa_attention import cpu
from deepserve.ops.gqa_attention.spec import gqa_attention
from deepserve.ops.paged import decode_groups, make_batch


def test_the_cases_reach_every_path():
    case = next(case for case in gqa_attention.cases if case.name == "decode_40")
    q, cache, batch, _, window = case.make(torch.Generator().manual_seed(1), torch.float32, "cpu")
    entry = 2 * cache[0, 0, 0].numel() * 4
    sizes = [len(group.slots) for group in decode_groups(batch, window, entry, q.dtype)]
    assert len(sizes) > 3 and min(sizes) < cpu.MIN_TOKENS <= max(sizes)
    assert all(size * entry <= paged.GATHER_BYTES for size in sizes)


def test_groups_hold_every_request_once_and_pad_it_at_most_twofold():
    contexts = [1, 500, 3, 64, 65, 64, 2, 130, 131, 7]
    batch, _ = make_batch([1] * 10, contexts, 16, torch.Generator().manual_seed(1))
    seen: list[int] = []
    for group in decode_groups(batch, None, 8, torch.float32):
        assert group.requests is not None
        padded = len(group.slots) // len(group.requests)
        visible = (group.mask == 0).sum(-1).flatten().tolist()
        assert visible == [contexts[request] for request in group.requests]
        assert padded == max(visible) <= 2 * min(visible)
        seen += group.requests.tolist()
    assert sorted(seen) == list(range(10))


def test_a_request_too_large_for_the_buffer_is_a_group_of_its_own(monkeypatch):
    monkeypatch.setattr(paged, "GATHER_BYTES", 1024)
    case = next(case for case in gqa_attention.cases if case.name == "decode_40")
    arguments = case.make(torch.Generator().manual_seed(1), torch.float32, "cpu")
    torch.testing.assert_close(cpu.function(*arguments), gqa_attention(*arguments), rtol=1e-5, atol=1e-5)
    assert len(decode_groups(arguments[2], None, 1536, torch.float32)) == 40
