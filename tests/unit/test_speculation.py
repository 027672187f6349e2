"""What stands of a row of drafts, the distribution of what is put out, and who proposes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepserve.messages import DraftCounts
from deepserve.ops.argmax.spec import argmax
from deepserve.ops.sample.spec import sample
from deepserve.sampling.columns import SamplingColumns
from deepserve.sampling.sampler import Sampler, SamplingRows
from deepserve.sampling.verify import verify
from deepserve.sampling_params import SamplingParams
from deepserve.spec_decode.ngram import continuations

VOCAB, PROMPT, NUM_TOKENS, NUM_DRAFTS, NUM_TRIALS = 9, (3, 1, 4), 3, 2, 200_000


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 2)), min_size=1, max_size=5), max_size=6
    )
)
def test_verify_says_what_its_definition_says(rows: list[list[tuple[int, bool, int]]]) -> None:
    expected = []
    for row in rows:
        count = 0
        for place, (token, drawn, draft) in enumerate(row):
            count += drawn
            if not drawn or place == len(row) - 1 or token != draft:
                break
        expected.append(count)
    tokens = np.array([token for row in rows for token, _, _ in row], np.int64)
    drawn = np.array([drawn for row in rows for _, drawn, _ in row], bool)
    drafts = np.array([draft for row in rows for draft in (*(draft for _, _, draft in row[:-1]), -1)], np.int64)
    assert verify(tokens, drawn, drafts, np.cumsum([0, *map(len, rows)])).tolist() == expected


# Each row of the table is the model's logits after that token; histories matter through penalties alone.
TABLE = torch.from_numpy(np.random.RandomState(2).randn(VOCAB, VOCAB).astype(np.float32) * 1.5)
SAMPLING = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 4, "temperature": 1.3},
    "top-p": {"top_p": 0.8},
    "penalties": {"presence_penalty": 0.6, "frequency_penalty": 0.5, "repetition_penalty": 1.4},
    "all": {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.02, "frequency_penalty": 0.7,
            "repetition_penalty": 1.2},
}  # fmt: skip


def probabilities(history: tuple[int, ...], sampling: SamplingParams) -> np.ndarray:
    """What the next token's distribution is by definition."""
    logits = TABLE[history[-1]].double().numpy().copy()
    output = history[len(PROMPT) :]
    for token in range(VOCAB):
        if token in history:
            r = sampling.repetition_penalty
            logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
        logits[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty * (
            token in output
        )
    p = np.exp(logits / sampling.temperature - (logits / sampling.temperature).max())
    p[p < (sampling.min_p or 0) * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    p[order[sampling.top_k or VOCAB :]] = 0
    p /= p.sum()
    p[order[int((np.cumsum(p[order]) < sampling.top_p).sum()) + 1 :]] = 0
    return p / p.sum()


def joint(sampling: SamplingParams) -> np.ndarray:
    """The distribution of NUM_TOKENS tokens after the prompt, [V, V, ...]."""
    found = np.ones((VOCAB,) * NUM_TOKENS)
    for tokens in itertools.product(range(VOCAB), repeat=NUM_TOKENS):
        for i, token in enumerate(tokens):
            found[tokens] *= probabilities((*PROMPT, *tokens[:i]), sampling)[token]
            if not found[tokens]:
                break
    return found


def generate(sampling: SamplingParams, propose, judge=verify, num_trials: int = NUM_TRIALS) -> tuple[np.ndarray, int]:
    """NUM_TOKENS tokens of every trial and how many drafts stood: the sampler's and verify's own arrays, no loop over
    trials. `propose(last tokens [N], trials [N], round) -> [N, NUM_DRAFTS]`.
    """
    sampler, columns = Sampler(argmax, sample), SamplingColumns.empty(num_trials)
    columns.write(slice(None), sampling, 0, False)
    columns.seed[:] = np.random.RandomState(5).randint(0, 2**63, num_trials, np.int64).astype(np.uint64)
    width = len(PROMPT) + NUM_TOKENS + NUM_DRAFTS + 1
    history = torch.zeros(num_trials, width, dtype=torch.int32)
    history[:, : len(PROMPT)] = torch.tensor(PROMPT)
    lengths, num_accepted = np.full(num_trials, len(PROMPT)), 0
    for turn in range(NUM_TOKENS):
        alive = np.flatnonzero(lengths < len(PROMPT) + NUM_TOKENS)
        if not len(alive):
            break
        places = lengths[alive][:, None] + np.arange(NUM_DRAFTS + 1)
        last = history[alive, lengths[alive] - 1].numpy()
        drafts = np.concatenate((propose(last, alive, turn), np.full((len(alive), 1), -1)), 1)
        history[alive[:, None], places[:, :-1]] = torch.from_numpy(drafts[:, :-1]).int()
        slots, positions = alive.repeat(NUM_DRAFTS + 1), places.reshape(-1)
        logits = TABLE[history[slots, positions - 1].long()]
        rows = SamplingRows(columns.take(slots), slots, positions, np.full(len(slots), len(PROMPT)), [], history)
        tokens, evidence = sampler.sample(logits, rows)
        starts = np.arange(len(alive) + 1) * (NUM_DRAFTS + 1)
        standing = judge(tokens.numpy(), evidence.isfinite().numpy(), drafts.reshape(-1), starts)
        history[slots, positions] = tokens.int()
        lengths[alive] += standing
        num_accepted += int(standing.sum()) - len(alive)
    return history[:, len(PROMPT) : len(PROMPT) + NUM_TOKENS].numpy(), num_accepted


def deviation(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square of the joint counts as a standard normal number (Wilson and Hilferty 1931); rare cells are one."""
    counts = np.zeros(expected.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    assert not counts[expected == 0].any(), "an impossible token"
    wanted = expected * len(tokens)
    common = wanted >= 10
    counts = np.append(counts[common], counts[~common].sum())
    wanted = np.append(wanted[common], max(wanted[~common].sum(), 1e-9))
    freedom = len(counts) - 1
    chi_square = ((counts - wanted) ** 2 / wanted).sum()
    return ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def likely(last: np.ndarray, trials: np.ndarray, turn: int) -> np.ndarray:
    best = TABLE.argmax(1).numpy()
    return np.stack((best[last], best[best[last]]), 1)


def by_chance(last: np.ndarray, trials: np.ndarray, turn: int) -> np.ndarray:
    return np.random.RandomState(turn).randint(0, VOCAB, (len(trials), NUM_DRAFTS))


@pytest.mark.parametrize("name", SAMPLING)
def test_the_output_has_the_models_distribution(name: str) -> None:
    sampling = SamplingParams(**SAMPLING[name])
    expected = joint(sampling)
    assert expected.sum() == pytest.approx(1)
    tokens, num_accepted = generate(sampling, likely)
    assert num_accepted > NUM_TRIALS / 10
    assert abs(deviation(tokens, expected)) < 4
    if name == "all":
        again, num_by_chance = generate(sampling, by_chance)
        assert 0 < num_by_chance < num_accepted
        assert (again == tokens).all()  # whoever proposes
        known, num_known = generate(sampling, lambda last, trials, turn: tokens[trials, :NUM_DRAFTS])
        assert (known == tokens).all()  # even one who knows what will be drawn
        assert num_known == NUM_DRAFTS * NUM_TRIALS


def test_another_rule_would_be_found_out() -> None:
    def lenient(tokens: np.ndarray, drawn: np.ndarray, drafts: np.ndarray, starts: np.ndarray) -> np.ndarray:
        near = np.where(np.abs(tokens - drafts) <= 1, drafts, tokens)
        tokens[:] = np.where(drafts < 0, tokens, near)
        return verify(tokens, drawn, drafts, starts)

    sampling = SamplingParams(temperature=0.7)
    assert deviation(generate(sampling, likely, lenient, 20_000)[0], joint(sampling)) > 8


def brute_force(tokens: list[int], shortest: int, longest: int, count: int) -> list[int] | None:
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                known = list(tokens)
                for i in range(count):
                    known.append(known[end + i])
                return known[len(tokens) :]
    return None


@given(st.data())
@settings(max_examples=150)
def test_ngrams_continue_as_the_text_did(data: st.DataObject) -> None:
    shortest = data.draw(st.integers(1, 3))
    longest, count = shortest + data.draw(st.integers(0, 3)), data.draw(st.integers(1, 8))
    rows = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=5))
    lengths = torch.tensor([len(row) for row in rows])
    junk = data.draw(st.integers(0, 2))  # behind the known tokens lies whatever was there before
    tokens = torch.full((len(rows), int(lengths.max())), junk, dtype=torch.int32)
    for target, row in zip(tokens, rows):
        target[: len(row)] = torch.tensor(row)
    found = continuations(tokens, lengths, shortest, longest, count)
    for row, got in zip(rows, found.tolist()):
        assert got == (brute_force(row, shortest, longest, count) or [-1] * count)


def test_counts() -> None:
    counts = DraftCounts()
    assert (counts.mean_length, counts.rates, counts.num_accepted_tokens) == (0.0, [], 0)
    for num_drafts, num_accepted in ((2, 1), (0, 0), (3, 3), (1, 0)):
        counts.add(num_drafts, num_accepted)
    assert counts == DraftCounts(3, 6, [2, 1, 1])
    assert (counts.mean_length, counts.rates) == (1 + 4 / 3, [2 / 3, 1 / 3, 1 / 3])
    assert counts - DraftCounts(1, 2, [1]) == DraftCounts(2, 4, [1, 1, 1])
    assert DraftCounts(1, 2, [1]) + counts == DraftCounts(4, 8, [3, 1, 1])
    assert (counts - counts).rates == [0, 0, 0]
