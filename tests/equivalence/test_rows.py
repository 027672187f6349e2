"""Every optimization on and off through the real engine: its counter proves that it fired, its exactness is kept.

Generated from the table: a new row is tested by being there.
"""

from pathlib import Path

import pytest

import deepserve
from deepserve import LLM, SamplingParams
from deepserve.config import Config
from deepserve.facts import gather_facts
from deepserve.optimizations import ROWS, TABLE, Row, decide
from tests.tiny import write_checkpoint

TOP = 5  # log-probabilities compared at each position
TOLERANCE = 2e-3  # of a log-probability in fp32, where kernels sum in another order
ROUNDED = {"fp8_linear", "fp8_kv_cache"}  # rows that round activations to FP8
FP8_TOLERANCE = 2e-2  # of a log-probability then: another last bit may round the other way
# FP8 against fp32 on random weights, whose best tokens are near-ties: how often the best one stays among the first TOP,
# and how far log-probabilities are apart on average, in nats (measured: 0.93 and 0.15; another model's: 0.01 and 1.05)
MIN_AGREEMENT, MAX_MEAN_GAP = 0.85, 0.25
SHARED = [(7 * i) % 290 + 5 for i in range(37)]  # more than two blocks
# Beginnings that are shared, a prompt of several chunks, one that is a single token, one that ends inside a block
PROMPTS = [
    [*SHARED, 11, 12], [*SHARED, 13], [*SHARED, 14, 15, 16], [(3 * i) % 280 + 9 for i in range(90)], [21], [22, 23, 24],
    [(5 * i) % 250 + 30 for i in range(33)], [*SHARED[:16], 40, 41],
]  # fmt: skip
# What a checkpoint's config has for these tests
SHAPES = {
    "deepseek-v3-fp8": {"q_lora_rank": 128, "intermediate_size": 384, "moe_intermediate_size": 128},  # whole blocks
    "deepseek-v3.2": {"index_topk": 40},  # longer than some contexts and shorter than others
}
# By row, where it is no other's model; a guess is right where the weights are not random.
NEEDS = {"skip_indexer": "deepseek-v3.2", "fp8_index_keys": "deepseek-v3.2", "speculative_decoding": "demo"}
MAX_PARTED = {"deepseek-v3.2": 3}  # of 16 answers: where index scores are near-ties, other sums choose other tokens


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Paths by name, written when first asked for."""
    paths = {"demo": str(Path(deepserve.__file__).parent / "demo")}

    def path(name: str) -> str:
        if name not in paths:
            paths[name] = str(write_checkpoint(name, tmp_path_factory.mktemp(name), **SHAPES.get(name, {})))
        return paths[name]

    return path


def required(row: Row) -> tuple[str, ...]:
    """What must be asked for; of several rows that would do, one is on by itself or none is possible."""
    return tuple(name for name in row.requires if name in ROWS)


def asked(row: Row, on: bool) -> dict:
    """Config fields that differ in this row alone; a step is short, so that prompts are cut."""
    off_too = () if on else (row.name,)
    off_too += tuple(other.name for other in TABLE if row.name in other.covers)
    if ROUNDED & set(row.requires):  # the norm before the rounding must be the same one on both sides
        off_too += ("cpu_kernels", "native_kernels")
    fields = {"on": (*required(row), *((row.name,) if on else ())), "off": off_too, "max_num_batched_tokens": 48}
    if row.name == "chunked_prefill" and not on:
        fields["max_num_batched_tokens"] = None
    return fields


def generate(path: str, fields: dict, score_prompts: bool = False) -> tuple[list, dict[str, int]]:
    """Two rounds of greedy answers with their log-probabilities (or the prompts' own), and the counters after them."""
    llm = LLM(path, dtype="float32", max_model_len=160, max_num_seqs=8, num_gpu_blocks_override=96, **fields)
    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=TOP, ignore_eos=True)
    try:
        if score_prompts:
            scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
            return llm.generate(PROMPTS, scoring, use_tqdm=False), dict(llm.engine.counters)
        rounds = [llm.generate(PROMPTS, sampling, use_tqdm=False) for _ in range(2)]
        return [answer.outputs[0] for answers in rounds for answer in answers], dict(llm.engine.counters)
    finally:
        llm.shutdown()


def compare(row: Row, on: list, off: list) -> None:
    if row.exactness == "accuracy":
        assert_accurate(on, off)
        return
    assert len(on) == len(off) == 2 * len(PROMPTS)
    assert all(len(answer.token_ids) == 12 for answer in (*on, *off))
    tolerance = FP8_TOLERANCE if ROUNDED & set(row.requires) else TOLERANCE
    for fast, slow in zip(on, off):
        if row.exactness == "bitwise":
            assert values(fast) == values(slow)
        if row.exactness in ("bitwise", "greedy"):
            assert fast.token_ids == slow.token_ids
        assert_close(fast, slow, tolerance)


def values(answer) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in position.items()} for position in answer.logprobs]


def assert_close(fast, slow, tolerance: float = TOLERANCE) -> None:
    """Log-probabilities agree as long as the tokens do; where they part, the two were as good as equal."""
    for position, (a, b) in enumerate(zip(values(fast), values(slow))):
        for token in a.keys() & b.keys():
            assert a[token] == pytest.approx(b[token], abs=tolerance), (position, token)
        assert max(a.values()) == pytest.approx(max(b.values()), abs=tolerance)
        if fast.token_ids[position] != slow.token_ids[position]:
            return


def assert_accurate(on: list, off: list) -> None:
    """At every position of every prompt: the most likely token mostly agrees, and the likely ones are near."""
    agreed, gaps = [], []
    for fast, slow in zip(on, off):
        for a, b in zip(fast.prompt_logprobs[1:], slow.prompt_logprobs[1:], strict=True):
            agreed.append(max(b, key=lambda token: b[token].logprob) in a)
            gaps += [abs(a[token].logprob - b[token].logprob) for token in a.keys() & b.keys()]
    assert len(agreed) == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert sum(agreed) / len(agreed) >= MIN_AGREEMENT
    assert 0 < sum(gaps) / len(gaps) <= MAX_MEAN_GAP


@pytest.mark.parametrize("name", ROWS)
def test_on_equals_off_and_on_fires(name, checkpoints) -> None:
    row = ROWS[name]
    path = checkpoints(NEEDS.get(name, "deepseek-v3-fp8" if "fp8" in name else "deepseek-v2-lite"))
    possible = decide(Config(model=path), gather_facts(Config(model=path)), "fp32")
    for other in required(row):
        if not possible[other].on and ROWS[other].default == "on":
            pytest.skip(f"{other}: {possible[other].reason}")
    config = Config(model=path, on=required(row))
    decision = decide(config, gather_facts(config), "fp32")[name]
    if not decision.on and row.default == "on":
        pytest.skip(decision.reason)
    on, fired = generate(path, asked(row, True), row.exactness == "accuracy")
    off, idle = generate(path, asked(row, False), row.exactness == "accuracy")
    assert fired[name] > 0, f"{name} is INERT: {row.counter}: 0"
    assert idle.get(name, 0) == 0, f"{name} fired though it is off"
    compare(row, on, off)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "deepseek-v3.2"])
def test_all_on_equals_all_off(family, checkpoints) -> None:
    """Together, on models with K/V heads and with an indexer: what rows do to one another."""
    path = checkpoints(family)
    possible = decide(Config(model=path), gather_facts(Config(model=path)), "fp32")
    wanted = tuple(row.name for row in TABLE if possible[row.name].on or row.default == "gpu")
    on, fired = generate(path, {"on": wanted, "max_num_batched_tokens": 48})
    off, idle = generate(path, {"off": tuple(ROWS)})
    covered = {name for row in TABLE if row.name in wanted for name in row.covers}
    assert all(fired[name] > 0 for name in wanted if name not in covered)
    assert not any(idle.values())
    parted = 0
    for fast, slow in zip(on, off):
        try:
            assert_close(fast, slow)
        except AssertionError:
            parted += 1
            if parted > MAX_PARTED.get(family, 0):
                raise
