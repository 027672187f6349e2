"""Steps of every size before the first request: what they look like, and that nothing of them is left."""

from __future__ import annotations

import pytest

from deepserve import LLM, SamplingParams
from deepserve.runner.warm_up import warm_up_sizes
from tests.tiny import write_checkpoint

PROMPTS = [[5, 6, 7], list(range(10, 45)), [8, 9]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("family", ["deepseek-v2-lite", "llama"])
def test_sizes_come_by_and_leave_nothing(family, tmp_path) -> None:
    llm = LLM(
        str(write_checkpoint(family, tmp_path)),
        max_model_len=64,
        max_num_seqs=6,
        num_gpu_blocks_override=20,
        enable_prefix_caching=False,
    )
    runner, batches = llm.engine.executor._runner, []
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    forward = runner.forward

    def seen(batch):
        batches.append(batch)
        return forward(batch)

    runner.forward = seen
    warm_up_sizes(runner, 150)
    runner.forward = forward
    rows = [len(batch.query_lens) for batch in batches if set(batch.query_lens) == {1}]
    assert rows == [1, 2, 4, 6, 1]
    mixed = [batch.query_lens for batch in batches if {1, 32} == set(batch.query_lens)]
    assert mixed == [[1] * count + [32] for count in (1, 2, 4, 5)]
    prompts = [batch.query_lens for batch in batches if 1 not in batch.query_lens]
    assert [sum(lengths) for lengths in prompts] == [2, 4, 8, 16, 32, 64, 128, 150, 32]
    assert max(map(max, prompts)) == 64 and batches[-1].context_lens == [64]
    for batch in batches:
        assert batch.num_single == sum(length == 1 for length in batch.query_lens)
        assert batch.query_start.tolist()[-1] == len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping)
        assert int(batch.positions.max()) < 64 and int(batch.slot_mapping.max()) < llm.plan.block_size
        assert batch.seq_lens.tolist() == batch.context_lens
        assert batch.block_table.shape[1] * batch.block_size >= batch.max_seq_len
    after = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in after] == expected
    llm.shutdown()
