"""The sampler against plain definitions: distributions, penalties, edits, ties, rows that ignore their neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepserve.errors import AskError
from deepserve.ops.argmax.spec import argmax
from deepserve.ops.load import load_kernel
from deepserve.ops.sample.spec import keep_leading, sample
from deepserve.sampling.columns import STRUCTURED, SamplingColumns, seed_of, uniforms
from deepserve.sampling.edits import Edits
from deepserve.sampling.logprobs import token_logprobs
from deepserve.sampling.penalties import penalise
from deepserve.sampling.sampler import Sampler, SamplingRows
from deepserve.sampling_params import SamplingParams

SAMPLER = Sampler(argmax, sample)
EOS = (1,)


def _rows(
    params: list[SamplingParams], histories: list[list[int]], prompts: list[int], vocab: int, device: str = "cpu"
) -> SamplingRows:
    columns = SamplingColumns.empty(len(params))
    edits = [Edits(one, EOS, vocab, device) for one in params]
    for row, one in enumerate(params):
        columns.write(row, one, seed_of(one, str(row), 0), bool(edits[row]))
    width = max(map(len, histories))
    history = torch.full((len(params), width + 3), vocab - 1, dtype=torch.int32)  # what is beyond must not matter
    for row, tokens in enumerate(histories):
        history[row, : len(tokens)] = torch.tensor(tokens)
    lengths = np.array([len(tokens) for tokens in histories])
    return SamplingRows(columns, np.arange(len(params)), lengths, np.array(prompts), edits, history.to(device))


def _sample(logits: torch.Tensor, params: list[SamplingParams], histories=None, prompts=None) -> torch.Tensor:
    histories = histories or [[3, 4]] * len(params)
    prompts = prompts or [2] * len(params)
    return SAMPLER.sample(logits, _rows(params, histories, prompts, logits.shape[1]))[0]


def _expected(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution of one row, token by token in plain Python and fp64."""
    z = (logits.double() / params.temperature).tolist()
    p = {token: np.exp(value - max(z)) for token, value in enumerate(z)}
    p = {token: value for token, value in p.items() if value >= params.min_p}
    order = sorted(p, key=lambda token: (-p[token], token))[: params.top_k or None]
    total, kept, reached = sum(p[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        reached += p[token]
        if reached >= params.top_p * total:
            break
    out = torch.zeros(len(z), dtype=torch.float64)
    for token in kept:
        out[token] = p[token]
    return out / out.sum()


PARAMS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.2),
    "all": SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
}


@pytest.mark.parametrize("name", PARAMS)
def test_draws_follow_the_distribution(name: str) -> None:
    """Chi-square over 20,000 draws with fixed seeds, refused at the 99.9 % quantile (Wilson and Hilferty's formula)."""
    num_draws, vocab = 20_000, 24
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    columns = SamplingColumns.empty(1)
    columns.write(0, PARAMS[name], 1234, False)
    columns = columns.take(np.zeros(num_draws, np.int64))
    rows = SamplingRows(
        columns, np.zeros(num_draws, np.int64), np.arange(num_draws), np.zeros(num_draws, np.int64), [None], None
    )
    drawn = SAMPLER.sample(logits.expand(num_draws, -1), rows)[0]
    counts = torch.bincount(drawn, minlength=vocab).double()
    expected = _expected(logits, PARAMS[name]) * num_draws
    assert (counts[expected == 0] == 0).all()
    used = expected > 0
    statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    free = max(1, int(used.sum()) - 1)
    assert statistic < free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3


def test_uniforms_are_uniform_and_independent_of_order() -> None:
    seeds, positions = np.arange(64, dtype=np.uint64).repeat(256), np.tile(np.arange(256), 64)
    u = uniforms(seeds, positions)
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == len(u)
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - 256) ** 2 / 256).sum() < 63 + 4 * (2 * 63) ** 0.5
    grid = u.reshape(64, 256)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert (uniforms(seeds[::-1].copy(), positions[::-1].copy())[::-1] == u).all()


def test_seeds() -> None:
    assert seed_of(SamplingParams(seed=-1), "a", 0) == 2**64 - 1
    assert seed_of(SamplingParams(), "a", 0) == seed_of(SamplingParams(), "a", 0) != seed_of(SamplingParams(), "b", 0)
    assert seed_of(SamplingParams(), "a", 0) != seed_of(SamplingParams(), "a", 1)


@given(data=st.data())
@settings(max_examples=60)
def test_filters_keep_what_the_definition_keeps_at_ties_too(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(2, 30))
    levels = data.draw(st.lists(st.integers(-3, 3), min_size=vocab, max_size=vocab))
    logits = torch.tensor(levels, dtype=torch.float32)
    params = SamplingParams(
        top_k=data.draw(st.integers(1, vocab)),
        top_p=data.draw(st.sampled_from([1e-6, 0.3, 0.55, 0.77, 0.93, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.011, 0.2, 0.9])),
    )
    least = logits.amax() + torch.tensor(params.min_p).log()
    top_k, top_p = torch.tensor([[params.top_k]]), torch.tensor([[params.top_p]], dtype=torch.float64)
    masses = (logits - logits.amax()).double().exp()
    p = keep_leading(logits[None], masses[None], least.view(1, 1), top_k, top_p)[0]
    expected = _expected(logits, params)
    assert (p > 0).tolist() == (expected > 0).tolist()
    torch.testing.assert_close(p / p.sum(), expected, rtol=1e-12, atol=0)


@given(data=st.data())
@settings(max_examples=40)
def test_penalties_by_the_book(data: st.DataObject) -> None:
    vocab, token = 12, st.integers(0, 11)
    histories = data.draw(st.lists(st.lists(token, min_size=1, max_size=20), min_size=1, max_size=4))
    prompts = [data.draw(st.integers(1, len(history))) for history in histories]
    values = [(0.5, 1.5, 1.3), (-1.0, 0.0, 0.7), (0.0, -0.5, 1.0), (2.0, 2.0, 2.0)][: len(histories)]
    logits = torch.randn(len(histories), vocab)
    width = max(map(len, histories))
    ids = torch.tensor([history + [0] * (width - len(history)) for history in histories])
    columns = [torch.tensor(column) for column in zip(*values)]
    got = penalise(logits, ids, torch.tensor(prompts), torch.tensor([len(h) for h in histories]), *columns)
    for row, (history, prompt, (presence, frequency, repetition)) in enumerate(zip(histories, prompts, values)):
        for v in range(vocab):
            x, n = logits[row, v].item(), history[prompt:].count(v)
            if v in history:
                x = x / repetition if x > 0 else x * repetition
            assert got[row, v].item() == pytest.approx(x - frequency * n - presence * (n > 0), abs=1e-5)


def test_edits_allow_forbid_and_bias() -> None:
    logits = torch.tensor([[5.0, 9.0, 4.0, 3.0, 2.0, 1.0]])

    def first(history=(3, 4), prompt=2, **params) -> int:
        bad = params.pop("bad_words_ids", [])
        asked = SamplingParams(temperature=0, bad_words_ids=bad, max_tokens=50, **params)
        return int(_sample(logits, [asked], [list(history)], [prompt]))

    assert first() == 1
    assert first(min_tokens=1) == 0
    assert first(min_tokens=1, history=(3, 4, 5)) == 1
    assert first(min_tokens=1, ignore_eos=True) == 1
    assert first(min_tokens=1, stop_token_ids=[0]) == 2
    assert first(allowed_token_ids=[4, 5]) == 4
    assert first(logit_bias={4: 8.0}) == 4
    assert first(bad_words_ids=[[1]]) == 0
    assert first(bad_words_ids=[[2, 1]], history=(3, 4, 2)) == 0
    assert first(bad_words_ids=[[2, 1]], history=(3, 4, 0)) == 1
    assert first(bad_words_ids=[[4, 1]]) == 1, "only what was put out counts"


def test_a_row_without_a_token_says_so() -> None:
    logits = torch.zeros(4, 6)
    logits[1, 2] = torch.nan
    params = [
        SamplingParams(allowed_token_ids=[4], bad_words_ids=[[4]]),
        SamplingParams(),
        SamplingParams(temperature=0, allowed_token_ids=[4], bad_words_ids=[[4]]),
        SamplingParams(),
    ]
    evidence = SAMPLER.sample(logits, _rows(params, [[1]] * 4, [1] * 4, 6))[1]
    assert evidence.isfinite().tolist() == [False, False, False, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("more", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1, "top_k": 2}])
def test_a_row_of_broken_logits_says_so(value: float, more: dict) -> None:
    params = SamplingParams(**more)
    everywhere, once = torch.full((1, 100), value), torch.arange(100.0)[None].clone()
    once[0, 7] = value
    for logits in (everywhere, once) if value > 0 or value != value else (everywhere,):
        evidence = SAMPLER.sample(logits, _rows([params], [[1]], [1], 100))[1]
        assert not evidence.isfinite().any()


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": {6: 1}}, {"allowed_token_ids": [-1]}, {"bad_words_ids": [[0, 6]]}, {"stop_token_ids": [2**40]}],
)
def test_ids_outside_the_vocabulary_are_refused(params: dict) -> None:
    with pytest.raises(AskError, match="not in the vocabulary of 6"):
        Edits(SamplingParams(**params), EOS, 6, "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop_token_ids": ["a"]}, {"stop_token_ids": [1.5]}, {"stop_token_ids": 5}, {"stop_token_ids": [True]},
        {"allowed_token_ids": ["a"]}, {"allowed_token_ids": 5}, {"allowed_token_ids": []},
        {"bad_words_ids": [[]]}, {"bad_words_ids": [5]}, {"bad_words": 5}, {"bad_words": [""]}, {"stop": 5},
        {"logit_bias": {"x": 1}}, {"logit_bias": [1]}, {"logit_bias": {2: float("nan")}}, {"logit_bias": {2: None}},
        {"detokenize": "no"}, {"ignore_eos": 1}, {"temperature": "1"}, {"max_tokens": True}, {"min_tokens": 17},
    ],
)  # fmt: skip
def test_what_a_request_cannot_mean_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(AskError) as caught:
        SamplingParams(**wrong)
    assert caught.value.field == next(iter(wrong))


def test_one_text_is_a_list_of_one() -> None:
    assert SamplingParams(stop="end", bad_words="abc") == SamplingParams(stop=["end"], bad_words=["abc"])


def _anything(index: int) -> SamplingParams:
    """Every feature, in ever other combinations."""
    on = np.random.RandomState(index).rand(12) < 0.4
    return SamplingParams(
        temperature=[0.0, 0.3, 1.0, 1.8][index % 4],
        seed=index if on[0] else None,
        top_k=7 if on[1] else 0,
        top_p=0.8 if on[2] else 1.0,
        min_p=0.05 if on[3] else 0.0,
        presence_penalty=0.7 if on[4] else 0.0,
        frequency_penalty=-0.4 if on[5] else 0.0,
        repetition_penalty=1.4 if on[6] else 1.0,
        logit_bias={3: 2.5, 9: -100} if on[7] else {},
        allowed_token_ids=list(range(0, 257, 3)) if on[8] else None,
        bad_words_ids=[[5], [2, 6]] if on[9] else [],
        min_tokens=9 if on[10] else 0,
        stop_token_ids=[12] if on[11] else [],
        max_tokens=50,
    )


@pytest.mark.parametrize("vocab", [257, 4099])
def test_a_row_ignores_its_neighbours(vocab: int) -> None:
    params = [_anything(index) for index in range(48)]
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(48, vocab, generator=generator) * 3).bfloat16().float()  # with ties
    histories = [torch.randint(vocab, (5 + i % 9,), generator=generator).tolist() for i in range(48)]
    rows = _rows(params, histories, [1 + i % 5 for i in range(48)], vocab)
    together = SAMPLER.sample(logits, rows)[0]
    for count in (1, 5):
        for _ in range(48 // count):
            chosen = np.random.permutation(48)[:count]
            part = SamplingRows(
                rows.columns.take(chosen),
                rows.slots[chosen],
                rows.positions[chosen],
                rows.num_prompt_tokens[chosen],
                [rows.edits[i] for i in chosen],
                rows.history,
            )
            assert SAMPLER.sample(logits[chosen], part)[0].tolist() == together[chosen].tolist()
    before = logits.clone()
    SAMPLER.sample(logits, rows)
    assert torch.equal(logits, before), "the logits belong to the caller"


def _everything(count: int, vocab: int, device: str) -> SamplingRows:
    """Rows that ask for everything that there is."""
    rows = _rows(
        [_anything(index) for index in range(count)],
        [[1 + i % 7] * (5 + i % 9) for i in range(count)],
        [1 + i % 5 for i in range(count)],
        vocab,
        device,
    )
    rows.masks = np.full((count, -(-vocab // 32)), -1, np.int32)
    rows.columns.needs[::3] |= STRUCTURED
    return rows


def test_the_host_looks_at_no_value() -> None:
    """On a device that has none, looking is an error."""
    tokens, evidence = SAMPLER.sample(torch.empty(48, 257, device="meta"), _everything(48, 257, "meta"))
    assert (tokens.device.type, evidence.device.type) == ("meta", "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_for_nothing() -> None:
    sampler = Sampler(load_kernel("argmax", "triton").function, load_kernel("sample", "triton").function)
    rows, logits = _everything(48, 4099, "cuda"), torch.randn(48, 4099, device="cuda")
    sampler.sample(logits, rows)
    try:
        torch.cuda.set_sync_debug_mode("error")
        sampler.sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_top_k_one_and_tiny_temperatures_are_greedy() -> None:
    logits = torch.randint(-2, 3, (20, 50), generator=torch.Generator().manual_seed(2)).float()
    for params in (SamplingParams(top_k=1), SamplingParams(temperature=1e-300), SamplingParams(top_p=1e-9)):
        assert torch.equal(_sample(logits, [params] * 20), logits.argmax(-1))


def test_logprobs_are_of_the_whole_distribution_with_ranks() -> None:
    logits = torch.randn(3, 40)
    chosen = torch.tensor([4, 0, int(logits[2].argmax())])
    got = token_logprobs(logits, chosen, [3, 0, 50])
    expected = torch.log_softmax(logits, -1)
    for row, one in enumerate(got):
        assert one.token_ids[0] == chosen[row]
        assert one.logprobs == pytest.approx([expected[row, token].item() for token in one.token_ids], abs=1e-6)
        order = expected[row].argsort(descending=True).tolist()
        assert one.ranks[0] == order.index(one.token_ids[0]) + 1
        assert one.token_ids[1:] == order[: len(one.token_ids) - 1]
        assert one.ranks[1:] == list(range(1, len(one.token_ids)))
    assert [len(one.token_ids) for one in got] == [4, 1, 41]
