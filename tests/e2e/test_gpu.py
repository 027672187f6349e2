"""On a GPU: many requests at once give what each gives alone, and leave nothing behind. Skipped where there is none."""

import gc
import json
import random
from collections.abc import Iterator

import pytest
import torch

from deepserve import LLM, SamplingParams
from deepserve.facts import known_models
from deepserve.outputs import RequestOutput

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYERS = 4
BOUND = 0.25  # between logits of the same token in bf16, computed in another batch by other kernels
FP8_BOUND = 0.5  # the same where latents are rounded to FP8, which may take one bit of bf16 for one of its own
VOCAB_SIZE = 102400


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("deepseek-v2-lite")
    config = known_models()["deepseek-v2-lite"] | {"num_hidden_layers": LAYERS}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def make(model: str, **fields) -> LLM:
    """A fifth of the memory: several workers may run these tests on one GPU."""
    return LLM(
        model, load_format="dummy", dtype="bfloat16", max_model_len=2048, seed=5, gpu_memory_utilization=0.2, **fields
    )


def ended(llm: LLM) -> None:
    llm.shutdown()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """The next engine plans with what is free."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def requests(count: int, **fields) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of many lengths, a third of which begin alike, and how many tokens each asks for."""
    rng = random.Random()
    prefix = [rng.randrange(VOCAB_SIZE) for _ in range(200)]
    prompts, params = [], []
    for number in range(count):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((1, 3, 63, 64, 65, 300, 700)))]
        prompts.append(prefix + prompt if number % 3 == 0 else prompt)
        length = rng.choice((1, 8, 40, 150))
        params.append(SamplingParams(temperature=0, ignore_eos=True, max_tokens=length, detokenize=False, **fields))
    return prompts, params


def regrets(llm: LLM, prompt: list[int], tokens: list[int]) -> list[float]:
    """By how much each token's log-probability is below the best one's, after the tokens before it."""
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    scored = llm.generate([prompt + tokens], scoring, use_tqdm=False)[0].prompt_logprobs
    entries = zip(scored[len(prompt) :], tokens, strict=True)
    return [max(one.logprob for one in entry.values()) - entry[token].logprob for entry, token in entries]


CROWDED = {"max_num_seqs": 96, "max_num_batched_tokens": 1024, "num_gpu_blocks_override": 160}  # 160 blocks are few
ALONE = {"max_num_seqs": 1, "cudagraph_mode": "NONE", "off": ("async_scheduling", "prefix_caching")}


def crowded(model: str, prompts, params, **fields) -> list[list[RequestOutput]]:
    """Two rounds of all at once, the second one with prefixes of the first; everything that may go wrong happens."""
    llm = make(model, **{**CROWDED, **fields})
    rounds = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    counters, stats = llm.engine.counters, llm.get_metrics()
    ended(llm)
    for name in ("cuda_graphs", "piecewise_graphs", "async_scheduling", "chunked_prefill", "prefix_caching"):
        assert counters[name] > 0, name
    assert stats["num_preemptions"] > 0
    assert stats["kv_cache_usage"] == 0
    return rounds


def test_many_at_once_are_each_alone(model):
    prompts, params = requests(256)
    rounds = crowded(model, prompts, params)
    check(make(model, **ALONE), prompts, rounds)


def test_fp8_latents_of_many_at_once_are_each_alone(model):
    prompts, params = requests(64)
    fields = {"max_num_seqs": 48, "kv_cache_dtype": "fp8", "enable_prefix_caching": False}
    llm = make(model, **fields)
    rounds = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    counters = llm.engine.counters
    ended(llm)
    assert counters["cuda_graphs"] > 0 and counters["piecewise_graphs"] > 0 and counters["fp8_kv_cache"] > 0
    check(
        make(model, **{**ALONE, **fields, "max_num_seqs": 1, "off": ("async_scheduling",)}), prompts, rounds, FP8_BOUND
    )


def test_batch_invariant_answers_are_the_same_bits(model):
    """Tokens and their log-probabilities, whatever was computed beside them and however prompts were cut."""
    prompts, params = requests(40, logprobs=2)
    rounds = crowded(model, prompts, params, on=("batch_invariant",), num_gpu_blocks_override=60)
    alone = make(model, **ALONE, on=("batch_invariant",))
    expected = [alone.generate([prompt], one, use_tqdm=False)[0] for prompt, one in zip(prompts, params)]
    ended(alone)
    for outputs in rounds:
        for output, other in zip(outputs, expected, strict=True):
            assert output.outputs[0].token_ids == other.outputs[0].token_ids
            assert _logprobs(output) == _logprobs(other)


def _logprobs(output: RequestOutput) -> list[dict[int, float]]:
    return [{token: one.logprob for token, one in entry.items()} for entry in output.outputs[0].logprobs]


def check(alone: LLM, prompts: list[list[int]], rounds: list[list[RequestOutput]], bound: float = BOUND) -> None:
    """Every answer's tokens are as good as the best ones of an engine that computes each alone, to the bound; counts
    where another token was the best one. Ends that engine."""
    found = []
    for outputs in rounds:
        for prompt, output in zip(prompts, outputs):
            found += regrets(alone, prompt, output.outputs[0].token_ids)
    ended(alone)
    ties, exceptions = sum(0 < one <= bound for one in found), sum(one > bound for one in found)
    print(
        f"{len(found)} tokens; {ties} are not the most probable ones alone but within {bound}, at most "
        f"{max(found):.3f} below; {exceptions} exceptions to that"
    )
    assert not exceptions


FIRES = {
    "NONE": set(), "PIECEWISE": {"piecewise_graphs"}, "FULL": {"cuda_graphs", "mixed_graphs"},
    "FULL_DECODE_ONLY": {"cuda_graphs"}, "FULL_AND_PIECEWISE": {"cuda_graphs", "piecewise_graphs"},
}  # fmt: skip


@pytest.mark.parametrize("mode", FIRES)
def test_every_graph_mode(model, mode, caplog):
    """What was recorded computes what is computed without; its memory was estimated, and later nothing is compiled."""
    caplog.set_level("INFO", logger="deepserve")
    prompts, params = requests(40)
    llm = make(model, max_num_seqs=24, max_num_batched_tokens=512, cudagraph_mode=mode)
    rounds = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    counters, memory = llm.engine.counters, llm.plan.memory
    ended(llm)
    assert {name for name in FIRES["FULL"] | FIRES["PIECEWISE"] if counters.get(name)} == FIRES[mode]
    told = [line for line in caplog.messages if "Graph capturing finished" in line]
    print(told)
    assert counters["kernels_compiled_while_serving"] == 0
    assert (len(told) == 1) == (memory.graph_bytes > 0) == (mode != "NONE")
    check(make(model, max_num_seqs=1, cudagraph_mode="NONE", off=("async_scheduling",)), prompts, rounds)


def test_memory_does_not_grow(model):
    llm = make(model, max_num_seqs=64, num_gpu_blocks_override=2000)
    used = []
    for _ in range(4):
        prompts, params = requests(64)
        llm.generate(prompts, params, use_tqdm=False)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    llm.shutdown()
    assert used[-1] <= used[1] + (8 << 20), used
