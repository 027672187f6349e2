"""How many requests and tokens a step may hold, and how many tokens a block of the cache."""

from __future__ import annotations

from deepserve.architecture import Mla
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.facts import Facts
from deepserve.optimizations import Decision
from deepserve.plan.memory import Load, Wish
from deepserve.plan.plan import Choice

# (requests, tokens) of a step and tokens of a block, where nothing is asked
CPU_SIZES = (64, 2048, 16)
GPU_SIZES = (256, 8192, 64)
TOKENS_WITH_SCORES = 2048  # of a step, while the attention keeps a score for every pair of tokens


def choose_sizes(
    config: Config, facts: Facts, dtype: str, rows: dict[str, Decision], kernels: dict[str, str]
) -> tuple[Load, Wish, list[Choice]]:
    """What the memory has to hold, what is wished of the cache, and the choices. AskError where sizes contradict."""
    on_cpu = facts.hardware.kind == "cpu"
    kind = "the default of a CPU" if on_cpu else "the default of a GPU"
    default_seqs, default_tokens, default_block = CPU_SIZES if on_cpu else GPU_SIZES
    mla = isinstance(facts.architecture.attention, Mla)
    keeps_scores = kernels["mla_attention" if mla else "gqa_attention"] == "reference"
    why_tokens, chunked = kind, rows["chunked_prefill"].on
    if keeps_scores and default_tokens > TOKENS_WITH_SCORES:
        default_tokens, why_tokens = (
            TOKENS_WITH_SCORES,
            "the reference attention keeps a score for every pair of tokens",
        )
    seqs = config.max_num_seqs or min(default_seqs, config.max_num_batched_tokens or default_seqs)
    tokens = config.max_num_batched_tokens or max(default_tokens, seqs)
    _check(config, facts, seqs, tokens, chunked)
    load = Load(
        facts.architecture, facts.hardware, dtype, config.tensor_parallel_size, rows["fp8_linear"].on, seqs, tokens,
        whole_prompts=not chunked, keeps_scores=keeps_scores,
    )  # fmt: skip
    block_size = config.block_size or default_block
    wish = Wish(block_size, config.kv_cache_memory_bytes, config.num_gpu_blocks_override, config.gpu_memory_utilization)
    if not chunked:
        why_tokens += ", and no less than a whole prompt"

    def choice(name: str, value: int, reason: str) -> Choice:
        return Choice(name, str(value), "asked for" if getattr(config, name) else reason)

    return load, wish, [
        choice("max_num_seqs", seqs, kind),
        choice("max_num_batched_tokens", tokens, why_tokens),
        choice("block_size", block_size, kind),
    ]  # fmt: skip


def _check(config: Config, facts: Facts, seqs: int, tokens: int, chunked: bool) -> None:
    field = "max_num_batched_tokens"
    if tokens < seqs:
        raise AskError(f"is {tokens}, below max_num_seqs {seqs}", field=field, hint=f"{seqs} or more")
    if chunked:
        return
    if config.long_prefill_token_threshold:
        raise AskError("splits prompts, and chunked prefill is off", field="long_prefill_token_threshold")
    limit = config.max_model_len or facts.architecture.max_position_embeddings
    if config.max_num_batched_tokens and tokens < limit:
        why = f"is {tokens}; without chunked prefill a step must hold a prompt of {limit} tokens"
        raise AskError(why, field=field, hint=f"{limit} or more, or a smaller max_model_len")
