"""The offline engine from prompt to text on tiny checkpoints, against transformers and against itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepserve import LLM, SamplingParams
from deepserve.errors import AskError
from tests.tiny import build_oracle, write_checkpoint

FAMILIES = [
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v3",
    "deepseek-v3-fp8",
    "llama",
    "mistral",
    "qwen2",
    "qwen3-moe",
]
PROMPTS = [[7, 9, 11], list(range(20, 61)), [300], [5, 5, 5, 5, 8] * 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """The directory of a tiny checkpoint by name, written once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def llm(checkpoint) -> LLM:
    """A small DeepSeek-V3 that several tests talk to."""
    return LLM(checkpoint("deepseek-v3"), max_model_len=256)


def _greedy(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 10, "ignore_eos": True, **changes})


def _tokens(outputs) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, checkpoint) -> None:
    llm = LLM(checkpoint(family), max_num_batched_tokens=16, max_num_seqs=3, max_model_len=128)
    got = _tokens(llm.generate(PROMPTS, _greedy(), use_tqdm=False))
    assert llm.engine.counters["chunked_prefill"] > 0
    model = build_oracle(family)
    for prompt, tokens in zip(PROMPTS, got):
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens == whole[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_transformers(checkpoint) -> None:
    llm = LLM(checkpoint("deepseek-v3"), max_num_batched_tokens=16, max_num_seqs=4, max_model_len=128)
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=6, logprobs=4, prompt_logprobs=3, ignore_eos=True)
    for _ in range(2):  # the second time the prompt is in the prefix cache, and its log-probabilities are asked again
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    model = build_oracle("deepseek-v3")
    for prompt, output in zip(PROMPTS, outputs):
        answer = output.outputs[0]
        ids = torch.tensor([prompt + answer.token_ids])
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0].float(), -1)
        assert output.prompt_logprobs[0] is None
        entries = [*output.prompt_logprobs[1:], *answer.logprobs]
        assert len(entries) == ids.shape[1] - 1
        for position, entry in enumerate(entries):
            row, chosen = expected[position], int(ids[0, position + 1])
            count = 3 if position + 1 < len(prompt) else 4
            assert next(iter(entry)) == chosen and set(entry) == {chosen, *row.topk(count).indices.tolist()}
            assert entry[chosen].rank == int((row > row[chosen]).sum()) + 1
            for token, one in entry.items():
                assert one.logprob == pytest.approx(row[token].item(), abs=2e-4)
                assert one.decoded_token == llm.tokenizer.decode([token])
        assert answer.cumulative_logprob == pytest.approx(
            sum(e[t].logprob for e, t in zip(answer.logprobs, answer.token_ids))
        )


def test_n_answers_are_n_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
    single = [SamplingParams(seed=11 + i, max_tokens=8, ignore_eos=True) for i in range(3)]
    assert _tokens([output]) == _tokens(llm.generate([PROMPTS[1]] * 3, single, use_tqdm=False))
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    unseeded = _tokens(llm.generate(PROMPTS[1], SamplingParams(n=3, max_tokens=8, ignore_eos=True), use_tqdm=False))
    assert len({tuple(tokens) for tokens in unseeded}) == 3


def test_stop_strings_end_the_answer_and_the_work(llm: LLM) -> None:
    (free,) = llm.generate([PROMPTS[0]], _greedy(max_tokens=40), use_tqdm=False)
    text, tokens = free.outputs[0].text, free.outputs[0].token_ids
    stop = next(text[i : i + 2] for i in range(4, len(text)) if "�" not in text[i : i + 2])
    for included in (False, True):
        params = _greedy(max_tokens=40, stop=[stop, "never"], include_stop_str_in_output=included)
        (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        answer = output.outputs[0]
        assert answer.text == text[: text.index(stop) + len(stop) * included]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert answer.token_ids == tokens[: len(answer.token_ids)] and len(answer.token_ids) < 40
    assert llm.get_metrics()["num_running"] == 0


def test_stop_tokens_min_tokens_and_max_tokens(llm: LLM) -> None:
    tokens = _tokens(llm.generate([PROMPTS[0]], _greedy(max_tokens=20), use_tqdm=False))[0]
    third = tokens[2]
    first = tokens.index(third)
    (output,) = llm.generate([PROMPTS[0]], _greedy(max_tokens=20, stop_token_ids=[third]), use_tqdm=False)
    answer = output.outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (tokens[: first + 1], "stop", third)
    later = _greedy(max_tokens=20, stop_token_ids=[third], min_tokens=8)
    (answer,) = llm.generate([PROMPTS[0]], later, use_tqdm=False)[0].outputs
    assert len(answer.token_ids) >= 8 and third not in answer.token_ids[:8]
    eos = SamplingParams(temperature=0, max_tokens=20, logit_bias={1: 100})
    (answer,) = llm.generate([PROMPTS[0]], eos, use_tqdm=False)[0].outputs
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason, answer.text) == ([1], "stop", None, "")
    eos.min_tokens = 5
    (answer,) = llm.generate([PROMPTS[0]], eos, use_tqdm=False)[0].outputs
    assert len(answer.token_ids) == 6 and 1 not in answer.token_ids[:5]
    eos.ignore_eos, eos.min_tokens = True, 0
    (answer,) = llm.generate([PROMPTS[0]], eos, use_tqdm=False)[0].outputs
    assert (answer.token_ids, answer.finish_reason) == ([1] * 20, "length")


def test_the_context_ends_an_answer(checkpoint) -> None:
    llm = LLM(checkpoint("llama"), max_model_len=32)
    params = [_greedy(max_tokens=None), _greedy(max_tokens=7), _greedy(max_tokens=3)]
    outputs = llm.generate([list(range(5, 30))] * 3, params, use_tqdm=False)
    assert [len(tokens) for tokens in _tokens(outputs)] == [7, 7, 3]
    assert {answer.finish_reason for output in outputs for answer in output.outputs} == {"length"}
    (full,) = llm.generate([list(range(5, 36))], _greedy(max_tokens=None), use_tqdm=False)
    assert len(full.outputs[0].token_ids) == 1
    with pytest.raises(AskError, match=r"prompts\[1\].max_tokens: is 8; .* has room for 7"):
        llm.generate([[5], list(range(5, 30))], _greedy(max_tokens=8), use_tqdm=False)
    with pytest.raises(AskError, match="is empty"):
        llm.generate("", _greedy(), use_tqdm=False)
    with pytest.raises(AskError, match=r"prompts\[1\]"):
        llm.generate([[5], list(range(5, 37))], _greedy(), use_tqdm=False)


def test_every_form_of_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("the quick brown")
    forms = ["the quick brown", {"prompt": "the quick brown"}, {"prompt_token_ids": ids}, ids]
    outputs = llm.generate(forms, _greedy(), use_tqdm=False)
    assert len({tuple(tokens) for tokens in _tokens(outputs)}) == 1
    assert [output.prompt for output in outputs] == ["the quick brown"] * 2 + [None] * 2
    assert all(output.prompt_token_ids == ids and output.finished for output in outputs)
    for alone in forms:
        assert _tokens(llm.generate(alone, _greedy(), use_tqdm=False)) == _tokens(outputs[:1])
    assert llm.generate([], use_tqdm=False) == []
    metrics = outputs[0].metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    lengths = [9, 1, 5, 12, 2, 7]
    prompts = [[10 + i] * (i + 1) for i in range(6)]
    outputs = llm.generate(prompts, [_greedy(max_tokens=length) for length in lengths], use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(tokens) for tokens in _tokens(outputs)] == lengths


def test_chat_is_generate_on_the_rendered_text(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    text = "<bos><|user|>the fox<|assistant|>"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    outputs = llm.chat([messages, messages], _greedy(), use_tqdm=False)
    assert outputs[0].prompt_token_ids == ids and ids[0] == 0
    assert _tokens(outputs) == 2 * _tokens(llm.generate(ids, _greedy(), use_tqdm=False))
    assert _tokens(llm.chat(messages, _greedy(), use_tqdm=False)) == _tokens(outputs[:1])


@pytest.mark.parametrize(
    "prompts, params, problem",
    [
        (["fine", {"text": "x"}], None, r"prompts\[1\].prompt: has \['text'\]"),
        (None, None, "prompts: is a NoneType"),
        ([[5], []], None, r"prompts\[1\].prompt: is empty"),
        ([[5], [5, 320]], None, r"prompts\[1\].prompt: token id 320"),
        ([[5], [True]], None, r"prompts\[1\]"),
        (["fine", "q" * 300], None, r"prompts\[1\].prompt: the prompt has 300 tokens"),
        ([[5]], [SamplingParams()] * 2, "2 of them for 1 prompts"),
        ([[5]], SamplingParams(logit_bias={320: 1}), r"prompts\[0\].logit_bias"),
        ([[5]], SamplingParams(stop=["x"], detokenize=False), r"prompts\[0\].stop"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm: LLM, prompts, params, problem: str) -> None:
    steps = llm.get_metrics()["num_steps"]
    with pytest.raises(AskError, match=problem):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.get_metrics()["num_steps"] == steps
    assert not llm.engine.scheduler.requests


def test_settings_are_checked_by_name(checkpoint) -> None:
    with pytest.raises(AskError, match="max_model_len"):
        LLM(checkpoint("llama"), max_modle_len=5)


def test_defaults_of_the_checkpoint_are_used(checkpoint, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.4, "top_p": 0.9, "top_k": 5}))
    llm = LLM(folder, max_model_len=64)
    assert llm.plan.default_sampling == {"temperature": 0.4, "top_p": 0.9, "top_k": 5}
    first, second = (llm.generate([PROMPTS[0]], params, use_tqdm=False) for params in (None, SamplingParams(seed=1)))
    assert len(first[0].outputs[0].token_ids) == 16 and second[0].finished


def test_a_bad_conversation_is_named(llm: LLM) -> None:
    fine = [{"role": "user", "content": "hi"}]
    with pytest.raises(AskError, match=r"prompts\[1\].messages"):
        llm.chat([fine, [{"content": 5}, 7]], use_tqdm=False)


def test_the_bar_counts_prompts_and_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    llm.generate(PROMPTS[:2], SamplingParams(n=2, max_tokens=3, ignore_eos=True))
    shown = capsys.readouterr().err
    assert "2/2" in shown and "in: " in shown and "out: " in shown and "cached: " in shown
    llm.generate(PROMPTS[:1], _greedy(), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_bad_words_never_appear(llm: LLM) -> None:
    (free,) = llm.generate([PROMPTS[3]], _greedy(max_tokens=30), use_tqdm=False)
    word = next(w for t in free.outputs[0].token_ids if "�" not in (w := llm.tokenizer.decode([t])) and w.strip())
    (output,) = llm.generate([PROMPTS[3]], _greedy(max_tokens=30, bad_words=[word]), use_tqdm=False)
    assert word in free.outputs[0].text
    assert llm.tokenizer.encode(word)[0] not in output.outputs[0].token_ids


def test_only_the_offline_packages_are_imported(checkpoint) -> None:
    without = "fastapi pydantic msgspec zmq prometheus_client uvicorn transformers triton tqdm httpx yaml".split()
    code = (
        f"import sys\nfor name in {without}: sys.modules[name] = None\n"
        "from deepserve import LLM, SamplingParams\n"
        f"llm = LLM({str(checkpoint('llama'))!r}, max_model_len=64)\n"
        "print(llm.generate(['the', 'fox'], SamplingParams(temperature=0, max_tokens=4))[1].outputs[0].token_ids)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split(",")) == 4
