"""Slots and batches against their plain definition, and what is left of a request in a slot: nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepserve.ops.argmax.spec import argmax
from deepserve.ops.sample.spec import sample
from deepserve.runner.model_runner import ModelRunner
from deepserve.runner.prepare import prepare
from deepserve.runner.slots import Slots
from deepserve.sampling.sampler import Sampler
from deepserve.sampling_params import SamplingParams
from deepserve.scheduler.output import NewRow, ScheduledRow, ScheduledStep

VOCAB, BLOCK, LENGTH = 64, 4, 40


def _slots(num_slots: int = 6) -> Slots:
    return Slots(num_slots, LENGTH, BLOCK, VOCAB, torch.device("cpu"), 0)


def _row(slot: int, scheduled: int, computed: int, blocks=(), new: NewRow | None = None, samples=True) -> ScheduledRow:
    return ScheduledRow(f"r{slot}", slot, scheduled, computed, list(blocks), new, samples)


def _new(token_ids: list[int], **sampling) -> NewRow:
    return NewRow(token_ids, len(token_ids), SamplingParams(**{"temperature": 0, "max_tokens": 99, **sampling}), (1,))


@given(data=st.data())
@settings(max_examples=60)
def test_a_batch_says_what_its_rows_say(data: st.DataObject) -> None:
    slots = _slots()
    chosen = data.draw(st.permutations(range(6)))[: data.draw(st.integers(1, 6))]
    free = iter(data.draw(st.permutations(range(6 * LENGTH // BLOCK))))
    rows, tokens, tables = [], {}, {}
    for slot in chosen:
        computed = data.draw(st.integers(0, 20))
        count = data.draw(st.sampled_from([1, 1, 2, 7, 13]))
        tokens[slot] = data.draw(
            st.lists(st.integers(0, VOCAB - 1), min_size=computed + count, max_size=computed + count)
        )
        tables[slot] = [next(free) for _ in range(-(-(computed + count) // BLOCK))]
        row = _row(slot, count, computed, tables[slot], _new(tokens[slot]), samples=data.draw(st.booleans()))
        slots.enter(row, row.new)
        slots.add_blocks(slot, row.new_block_ids)
        rows.append(row)
    prepared = prepare(ScheduledStep(0, rows, [], 0), slots)
    batch, end = prepared.batch, 0
    assert sorted(row.slot for row in prepared.rows) == sorted(chosen)
    assert batch.num_single == sum(row.num_scheduled_tokens == 1 for row in rows)
    assert batch.block_table.dtype == batch.query_start.dtype == batch.seq_lens.dtype == torch.int32
    for i, row in enumerate(prepared.rows):
        assert (row.num_scheduled_tokens == 1) == (i < batch.num_single)
        start, end = end, end + row.num_scheduled_tokens
        positions = range(row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens)
        table = tables[row.slot]
        assert batch.token_ids[start:end].tolist() == [tokens[row.slot][p] for p in positions]
        assert batch.positions[start:end].tolist() == list(positions)
        assert batch.slot_mapping[start:end].tolist() == [table[p // BLOCK] * BLOCK + p % BLOCK for p in positions]
        assert batch.query_start[i : i + 2].tolist() == [start, end]
        assert batch.seq_lens[i] == batch.context_lens[i] == positions[-1] + 1
        assert batch.query_lens[i] == len(positions)
        assert batch.block_table[i, : len(table)].tolist() == table
    ends = [batch.query_start[i + 1] - 1 for i, row in enumerate(prepared.rows) if row.samples]
    assert batch.sample_idx.tolist() == ends
    assert (batch.max_query_len, batch.max_seq_len) == (max(batch.query_lens), max(batch.context_lens))


def _state(slots: Slots) -> dict:
    """Every byte that a slot holds, but who it belongs to and how many it belonged to."""
    columns = {name: getattr(slots.columns, name) for name in slots.columns.__slots__}
    arrays = {"tokens": slots.token_ids.numpy(), "table": slots.block_table, "blocks": slots.num_blocks}
    lists = {"edits": slots.edits, "logprobs": slots.logprobs, "prompts": slots.prompt_logprobs}
    found = {**columns, **arrays, "num_prompt": slots.num_prompt_tokens, "ids": slots.request_ids, **lists}
    return {name: list(value) if isinstance(value, list) else value.copy() for name, value in found.items()}


def test_nothing_is_left_in_a_released_slot() -> None:
    slots = _slots()
    clean = _state(slots)
    everything = {
        "temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 5, "stop_token_ids": [3], "min_tokens": 4,
        "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 2, "logprobs": 2, "prompt_logprobs": 3,
        "logit_bias": {5: 1.0}, "allowed_token_ids": [5, 6], "bad_words_ids": [[7]],
    }  # fmt: skip
    row = _row(2, 9, 0, [5, 6, 7], _new([9] * 9, **everything))
    slots.enter(row, row.new)
    slots.add_blocks(2, row.new_block_ids)
    used = _state(slots)
    assert [name for name in clean if np.array_equal(clean[name], used[name])] == []
    slots.release(2)
    after = _state(slots)
    assert [name for name in clean if not np.array_equal(clean[name], after[name])] == []
    assert slots.generation.tolist() == [0, 0, 1, 0, 0, 0]


def _runner(num_slots: int = 6) -> ModelRunner:
    """A model whose next token is (token + position) % VOCAB, whatever is asked."""

    def forward(batch) -> torch.Tensor:
        return torch.nn.functional.one_hot((batch.token_ids + batch.positions) % VOCAB, VOCAB).float()

    return ModelRunner(forward, lambda hidden: hidden * 20, Sampler(argmax, sample), _slots(num_slots))


def test_sampled_tokens_are_read_back_from_the_slot() -> None:
    runner, expected = _runner(), [3, 1, 4]
    row = _row(1, 3, 0, [0], _new([3, 1, 4]))
    for step in range(9):
        result = runner.execute(ScheduledStep(step, [row], [], 0))
        expected.append((expected[-1] + len(expected) - 1) % VOCAB)
        assert (result.step, result.sampled) == (step, {"r1": [expected[-1]]})
        row = _row(1, 1, len(expected) - 1, [len(expected) // BLOCK] if len(expected) % BLOCK == 1 else [])


def test_a_slot_is_given_to_one_request_at_a_time() -> None:
    runner = _runner()
    runner.execute(ScheduledStep(0, [_row(0, 2, 0, [0], _new([5, 6]))], [], 2))
    with pytest.raises(RuntimeError, match="given to"):
        runner.execute(ScheduledStep(1, [_row(0, 2, 0, [1], _new([5, 6]))], [], 2))
    stranger = ScheduledRow("other", 0, 1, 2, [], None, True)
    with pytest.raises(RuntimeError, match="not other's"):
        runner.execute(ScheduledStep(2, [stranger], [], 1))
    again = ScheduledRow("other", 0, 1, 0, [2], _new([7]), True)
    assert runner.execute(ScheduledStep(3, [again], [0], 1)).sampled == {"other": [7]}
    assert runner.slots.token_ids[0, :3].tolist() == [7, 7, 0]


def test_a_broken_request_ends_alone() -> None:
    runner = _runner()
    rows = [
        _row(0, 2, 0, [0], _new([5, 6])),
        _row(1, 2, 0, [1], _new([5, 6], logit_bias={VOCAB: 1})),
        _row(2, 2, 0, [2], _new([5, 6], allowed_token_ids=[3], bad_words_ids=[[3]])),
    ]
    result = runner.execute(ScheduledStep(0, rows, [], 6))
    assert result.sampled["r0"] == [7]
    assert "not in the vocabulary" in str(result.errors["r1"])
    assert "no token can be sampled" in result.errors["r2"]


def test_each_row_gets_its_own_token_for_ever(num_steps: int = 300) -> None:
    """Slots recycled at random; every request may only put out one token, which nobody else may."""
    runner, rng = _runner(8), np.random.RandomState(0)
    alive: dict[int, ScheduledRow] = {}
    released: list[int] = []
    for step in range(num_steps):
        for slot in range(8):
            if slot in alive and rng.rand() < 0.3:
                del alive[slot]
                released.append(slot)
        rows = []
        for slot in range(8):
            name = f"{step}-{slot}"
            if slot in alive:
                before = alive[slot]
                done = before.num_computed_tokens + before.num_scheduled_tokens
                if done + 1 >= LENGTH:
                    continue
                row = ScheduledRow(before.request_id, slot, 1, done, [(slot * 10 + done // BLOCK)], None, True)
                row.new_block_ids = row.new_block_ids if done % BLOCK == 0 else []
            else:
                own = int(name.split("-")[0]) % 7 * 8 + slot
                new = _new([1] * int(rng.randint(1, 6)), allowed_token_ids=[own], temperature=float(rng.rand() < 0.5))
                blocks = [slot * 10, slot * 10 + 1][: -(-len(new.token_ids) // BLOCK)]
                row = ScheduledRow(f"{name}={own}", slot, len(new.token_ids), 0, blocks, new, True)
            alive[slot] = row
            rows.append(row)
        result = runner.execute(ScheduledStep(step, rows, released, 0))
        released = []
        assert not result.errors
        assert {name: [int(name.split("=")[1])] for name in result.sampled} == result.sampled
    assert runner.slots.generation.min() > num_steps / 10
