"""A request's answer is its own: the same alone and in any batch, chunked, cached, preempted, scheduled ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepserve import LLM, SamplingParams
from deepserve.sampling_params import StructuredOutputsParams
from tests.tiny import write_checkpoint

LENGTH = 96
PREFIX = [30 + i % 17 for i in range(22)]
PROMPTS = [
    [7, 9, 11], [*PREFIX, 5], [300], list(range(20, 61)), [*PREFIX, 6, 7], [8] * 9, [*PREFIX], [2, 3, 4, 5],
    [*PREFIX, 5, 5], [44, 45], list(range(100, 133)), [9], [12, 13], [*PREFIX, 15], [16],
]  # fmt: skip
SCHEMA = {"type": "array", "items": {"enum": ["cat", 7, None]}, "minItems": 3, "maxItems": 9}
FEATURES: list[dict] = [
    {"temperature": 0},
    {},
    {"top_k": 9, "temperature": 0.7},
    {"top_p": 0.8, "frequency_penalty": 0.9},
    {"temperature": 0, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    {"min_p": 0.1, "temperature": 1.3, "stop": ["t", "he"]},
    {"logit_bias": {7: 5.0, 9: 4.0, 11: 4.5}, "logprobs": 2},
    {"allowed_token_ids": list(range(0, 320, 5)), "top_p": 0.95, "top_k": 30},
    {"temperature": 0, "bad_words_ids": [[7], [44, 45]], "prompt_logprobs": 1},
    {"min_tokens": 20, "stop_token_ids": list(range(60, 120)), "ignore_eos": False},
    {"temperature": 0, "min_tokens": 12, "stop_token_ids": list(range(1, 320, 2))},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "n": 2},
    {"structured_outputs": StructuredOutputsParams(regex="([a-f]{3}[0-9]{2} ){4,9}x"), "top_p": 0.9},
    {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "temperature": 0, "min_tokens": 12},
    {"structured_outputs": StructuredOutputsParams(choice=["yes", "nö"]), "ignore_eos": False},
]
PARAMS = [
    SamplingParams(**{"seed": 100 + i, "max_tokens": 24 + i, "ignore_eos": True, **features})
    for i, features in enumerate(FEATURES)
]
FAMILIES = ["deepseek-v3", "deepseek-v3.2", "deepseek-v4", "mistral"]
SMALL = {"deepseek-v4": 8}  # tokens of the smallest block that the family can have here


def _block_size(alone: tuple[Path, list, list]) -> int:
    return SMALL.get(alone[0].name, 4)


def _answers(outputs) -> list[tuple]:
    return [
        (output.prompt_token_ids[:1], answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason)
        for output in outputs
        for answer in output.outputs
    ]


def _logprobs(outputs) -> list[float]:
    entries = [
        entry
        for output in outputs
        for entry in [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
        if entry
    ]
    return [one.logprob for entry in entries for one in entry.values()]


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, list]:
    """The checkpoint, and each request's answer and log-probabilities with nobody else there and nothing cached."""
    path = write_checkpoint(request.param, tmp_path_factory.mktemp("invariance") / request.param)
    llm = LLM(path, max_model_len=LENGTH, enable_prefix_caching=False)
    outputs = [llm.generate([p], s, use_tqdm=False)[0] for p, s in zip(PROMPTS, PARAMS)]
    return path, _answers(outputs), _logprobs(outputs)


def _check(alone: tuple[Path, list, list], rounds: int = 1, **config) -> LLM:
    path, answers, logprobs = alone
    llm = LLM(path, max_model_len=LENGTH, **config)
    for turn in range(rounds):
        order = list(range(len(PROMPTS)))[:: 1 - 2 * (turn % 2)]
        outputs = llm.generate([PROMPTS[i] for i in order], [PARAMS[i] for i in order], use_tqdm=False)
        outputs = outputs[:: 1 - 2 * (turn % 2)]
        assert _answers(outputs) == answers
        assert _logprobs(outputs) == pytest.approx(logprobs, abs=2e-4)
    assert not llm.engine.scheduler.requests
    llm.shutdown()
    return llm


def test_the_requests_differ_and_end_in_every_way(alone) -> None:
    answers = alone[1]
    assert {reason for *_, reason, _ in answers} == {"stop", "length"}
    assert len({tuple(tokens) for _, tokens, *_ in answers}) == len(answers)
    assert sum(map(len, (tokens for _, tokens, *_ in answers))) > 200


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_together(alone, ahead: bool) -> None:
    llm = _check(alone, async_scheduling=ahead)
    assert (llm.engine.counters["async_scheduling"] > 0) == ahead


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_in_chunks_and_few_at_a_time(alone, ahead: bool) -> None:
    llm = _check(alone, max_num_batched_tokens=7, max_num_seqs=5, block_size=_block_size(alone), async_scheduling=ahead)
    assert llm.engine.counters["chunked_prefill"] > 5


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_from_the_prefix_cache(alone, ahead: bool) -> None:
    llm = _check(alone, rounds=2, block_size=_block_size(alone), async_scheduling=ahead, max_num_batched_tokens=64)
    assert llm.get_metrics()["num_prefix_hits"] > 60


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
def test_preempted(alone, ahead: bool, caching: bool) -> None:
    llm = _check(
        alone,
        num_gpu_blocks_override=104 // _block_size(alone),
        block_size=_block_size(alone),
        max_num_batched_tokens=32,
        async_scheduling=ahead,
        enable_prefix_caching=caching,
    )
    assert llm.get_metrics()["num_preemptions"] > 2


def test_with_every_optimization_off(alone) -> None:
    off = (
        "native_kernels", "packed_linear", "cpu_kernels", "fusion_add_rms_norm", "fusion_rms_norm_rope_write_latent",
        "prefix_caching",
    )  # fmt: skip
    llm = _check(alone, off=off, max_num_seqs=4)
    assert not any(llm.engine.counters[name] for name in off)


def test_resetting_the_prefix_cache_forgets_it(alone) -> None:
    llm = LLM(alone[0], max_model_len=LENGTH, block_size=_block_size(alone))
    params = SamplingParams(temperature=0, max_tokens=2)
    cached = []
    for turn in range(3):
        if turn == 2:
            assert llm.reset_prefix_cache()
        cached.append(llm.generate([PROMPTS[3]], params, use_tqdm=False)[0].num_cached_tokens)
    assert cached == [0, 40, 0]
