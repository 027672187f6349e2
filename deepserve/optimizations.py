"""Every speed-up as a row: from it come its switch, its line in the documentation, its on/off test and its ablation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deepserve import conditions
from deepserve.compilation import MODES
from deepserve.config import Config
from deepserve.errors import AskError, did_you_mean
from deepserve.facts import Facts

EXACTNESS = {
    "bitwise": "the same bits",
    "greedy": "the same greedy tokens",
    "tolerance": "logits within the tolerance of the kernels",
    "accuracy": "other numbers, within an accuracy gate",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One optimization. `counter` says what engine.counters[name] counts: a row that is on and counts nothing is INERT.

    default: "on" wherever it is possible, "gpu" only there, or "off". needs(facts, dtype) is None or why not.
    `requires` names rows above it ("this or that": one of them), `excludes` rows above it beside which it cannot be on,
    and why; `covers` rows that it may leave nothing to do. `kernels` may only be chosen while the row is on; `fuses`
    names the op that the graph rewriting may put in; `field` is the Config field that switches the row as well, where
    its value is not the default: on if `means_on(value)`; `replays`: it runs whole steps, in which no op is called by
    itself.
    """

    name: str
    sentence: str
    exactness: str
    counter: str
    default: str = "on"
    needs: Callable[[Facts, str], str | None] = lambda facts, dtype: None
    requires: tuple[str, ...] = ()
    excludes: tuple[tuple[str, str], ...] = ()
    covers: tuple[str, ...] = ()
    replays: bool = False
    kernels: tuple[str, ...] = ()
    fuses: str | None = None
    field: str | None = None
    means_on: Callable[[Any], bool] = bool


FP8_CACHES = ("fp8", "fp8_e4m3")  # spellings of kv_cache_dtype
_BY_SIZE = (("batch_invariant", "its kernels suit the number of tokens, which decides how they sum"),)
_PACKED = "packed_linear or native_kernels"
_COMPILED = "triton_kernels or native_kernels"


def _fusion(op: str, sentence: str, *requires: str) -> Row:
    return Row(
        f"fusion_{op}", sentence, "tolerance", "places in the graph where it was put in", requires=requires, fuses=op
    )


def _graphs(name: str, counter: str, sentence: str, requires: str = "triton_kernels", **more: Any) -> Row:
    return Row(
        name, sentence, "tolerance", counter, needs=conditions.recordable, requires=(requires,), replays=True,
        field="cudagraph_mode", means_on=lambda mode: name in MODES[mode], **more,
    )  # fmt: skip


TABLE = (
    Row(
        "prefix_caching",
        "Prompts that begin alike share the KV cache of what they share.",
        "greedy",
        "prompt tokens found in the cache",
        field="enable_prefix_caching",
    ),
    Row(
        "chunked_prefill",
        "A prompt may span several steps, so that answers that are being written go on beside it.",
        "greedy",
        "steps that computed a part of a prompt",
        field="enable_chunked_prefill",
    ),
    Row(
        "speculative_decoding",
        "The checkpoint's MTP layer, or the request's own text, guesses tokens; one step verifies several of them.",
        "greedy",
        "guessed tokens that were accepted",
        default="off",
        field="speculative_config",
    ),
    Row(
        "async_scheduling",
        "The next step is scheduled while a step runs; its sampled tokens stay on the device.",
        "greedy",
        "steps scheduled before the result of the step before them was known",
        default="gpu",
        excludes=(("speculative_decoding", "how much of a step was accepted decides what the next one computes"),),
        field="async_scheduling",
    ),
    Row(
        "fp8_kv_cache",
        "Latents are cached in FP8 with a scale each, rope channels as they are: V3's take 656 bytes instead of 1,152.",
        "accuracy",
        "caches of latents in FP8",
        default="off",
        needs=conditions.fp8_entries,
        field="kv_cache_dtype",
        means_on=FP8_CACHES.__contains__,
    ),
    Row(
        "triton_kernels",
        "Portable Triton kernels in the place of the references; the vendor's matrix products where those are faster.",
        "tolerance",
        "calls in the graph that such a kernel serves",
        kernels=("triton",),
    ),
    Row(
        "overlapped_launches",
        "A kernel is launched, and loads its weights, while the one before it ends (programmatic dependent launch).",
        "bitwise",
        "kernels that were launched so, while the engine was built",
        needs=conditions.launches_that_overlap,
        requires=("triton_kernels",),
    ),
    Row(
        "batch_invariant",
        "A request's logits are the same bits whatever is computed beside it and however its prompt is cut: products "
        "and attention sum in one order.",
        "tolerance",
        "calls in the graph that such a kernel serves",
        default="off",
        needs=conditions.attention_row_by_row,
        requires=("triton_kernels",),
        excludes=(("fp8_kv_cache", "attention to FP8 latents has no such kernel"),),
        kernels=("invariant",),
    ),
    _graphs(
        "cuda_graphs",
        "steps that were replayed",
        "Steps in which every request computes one token are recorded, once for each padded size, and replayed.",
    ),
    _graphs(
        "piecewise_graphs",
        "steps that were replayed in pieces",
        "What lies between two attentions is recorded, once for each padded number of tokens, and replayed.",
    ),
    _graphs(
        "mixed_graphs",
        "mixed steps that were replayed",
        "Mixed steps replay whole too, each token as a row of its own: for short ones, since every token of a prompt "
        "then reads its whole context.",
        "cuda_graphs",
        default="off",
        covers=("piecewise_graphs",),
    ),
    Row(
        "cpu_kernels",
        "Attention, experts, norms and rotations in forms that suit a CPU's caches and threads.",
        "tolerance",
        "calls in the graph that a CPU kernel serves",
        kernels=("cpu",),
    ),
    Row(
        "packed_linear",
        "Linear weights are packed once, after loading, in the layout that oneDNN computes in.",
        "tolerance",
        "linear layers with packed weights",
        kernels=("onednn",),
    ),
    Row(
        "native_kernels",
        "C kernels for AVX-512 BF16, compiled at first start and kept in ~/.cache/deepserve.",
        "tolerance",
        "calls in the graph that a C kernel serves",
        covers=("cpu_kernels", "packed_linear"),
        kernels=("native",),
    ),
    Row(
        "recorded_steps",
        "Steps of up to 16 requests that compute one token each replay what C was called for, in one call from Python.",
        "bitwise",
        "steps that were replayed",
        replays=True,
        needs=conditions.replayable,
        requires=("native_kernels",),
        excludes=(("fp8_kv_cache", "its attention on a CPU looks at lengths on the host"),),
    ),
    Row(
        "fp8_linear",
        "The weights of an FP8 checkpoint stay in FP8, and activations are quantised to it in groups of 128 channels.",
        "accuracy",
        "linear layers with FP8 weights",
        default="off",
        needs=conditions.an_fp8_checkpoint,
        excludes=(("batch_invariant", "products of FP8 weights have no such kernel"),),
    ),
    Row(
        "skip_indexer",
        "A step whose requests are no longer than top-k is computed dense: nothing is scored, chosen or gathered.",
        "tolerance",
        "steps that were computed dense",
        needs=conditions.an_indexer,
    ),
    Row(
        "fp8_index_keys",
        "The indexer's keys are cached in FP8 with a scale each, its queries rounded to it, both Hadamard-transformed.",
        "accuracy",
        "caches of index keys in FP8",
        default="off",
        needs=conditions.an_indexer_to_transform,
    ),
    _fusion("add_rms_norm", "The residual addition and the norm that follows it are one pass, across layers too."),
    replace(
        _fusion(
            "linear_add_rms_norm",
            "A projection adds the residual to its sums; the norm follows at once.",
            f"triton_kernels or {_PACKED}",
        ),
        excludes=_BY_SIZE,
        covers=("fusion_add_rms_norm",),
    ),
    _fusion("linear_silu_mul", "The gated activation is applied to the sums of its projections.", _PACKED),
    replace(
        _fusion("rms_norm_rope_write_latent", "A token's latent is normalised, rotated and cached in one pass."),
        needs=conditions.latent_attention,
        excludes=(("fp8_kv_cache", "latents go into bytes, and that fusion is another"),),
    ),
    _fusion(
        "rms_norm_rope_write_latent_fp8",
        "A token's latent is normalised, rounded to FP8, rotated and cached in one pass.",
        "fp8_kv_cache",
    ),
    replace(
        _fusion(
            "rope_write_mla_attention",
            "In steps of a few tokens all that comes before latent attention is one kernel.",
            "triton_kernels",
        ),
        needs=conditions.latent_attention,
        excludes=(("fp8_kv_cache", "its attention and its cache entries are other ops"), *_BY_SIZE),
        covers=("fusion_rms_norm_rope_write_latent",),
    ),
    replace(
        _fusion(
            "linear_moe_route", "A router and its projection in at most two kernels, with nothing cast.", _COMPILED
        ),
        needs=conditions.experts,
        excludes=_BY_SIZE,
    ),
    replace(
        _fusion(
            "moe_experts_add_rms_norm",
            "Routed and shared experts share two products; one pass weighs, sums, adds the residual and normalises.",
            _COMPILED,
        ),
        needs=conditions.experts_and_residual,
        excludes=_BY_SIZE,
        covers=("fusion_add_rms_norm",),
    ),
    replace(
        _fusion(
            "linear_moe_experts_add_rms_norm",
            "In steps of a few tokens the router's product is computed beside the first one of the shared experts.",
            "triton_kernels",
        ),
        needs=conditions.experts_and_residual,
        excludes=_BY_SIZE,
        covers=("fusion_linear_moe_route", "fusion_moe_experts_add_rms_norm", "fusion_add_rms_norm"),
    ),
    _fusion("rms_norm_quant_fp8", "A norm and the FP8 quantisation of its result are one pass.", "fp8_linear"),
    _fusion("add_rms_norm_quant_fp8", "Residual addition, norm and FP8 quantisation are one pass.", "fp8_linear"),
    _fusion(
        "silu_mul_quant_fp8", "The gated activation and the FP8 quantisation of its result are one pass.", "fp8_linear"
    ),
)

ROWS = {row.name: row for row in TABLE}


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a row is on, and why."""

    on: bool
    reason: str


def decide(config: Config, facts: Facts, dtype: str) -> dict[str, Decision]:
    """Every row on or off. AskError where what was asked is unknown, impossible or contradicts itself."""
    asked = _asked(config)
    decisions: dict[str, Decision] = {}
    for row in TABLE:
        why_not = _why_not(row, facts, dtype, decisions)
        if row.replays and (config.trace_ops or config.capture_shapes):
            why_not = why_not or "every op is watched (trace_ops, capture_shapes), and what is replayed calls none"
        want = asked.get(row.name)
        if want and why_not:
            raise _impossible(row, config, why_not)
        if want is not None:
            decisions[row.name] = Decision(want, "asked for")
        elif why_not or row.default == "off":
            cost = "it changes the numbers" if row.exactness == "accuracy" else "it is not always faster"
            decisions[row.name] = Decision(False, why_not or f"off unless asked for: {cost}")
        elif row.default == "gpu" and facts.hardware.device == "cpu":
            decisions[row.name] = Decision(False, "the CPU that would schedule is the one that computes")
        else:
            decisions[row.name] = Decision(True, EXACTNESS[row.exactness])
    return decisions


def _impossible(row: Row, config: Config, why_not: str) -> AskError:
    if row.field and row.name not in config.on:
        value = getattr(config, row.field)
        shown = value if isinstance(value, str) else "on"
        return AskError(f"cannot be {shown}: {why_not}", field=row.field, hint="leave it out")
    return AskError(f"cannot be on: {why_not}", field=row.name, hint=f"leave it out, or --off {row.name}")


def _asked(config: Config) -> dict[str, bool]:
    """What --on, --off and the Config fields of rows say. A field that still has its default says nothing."""
    for name in (*config.on, *config.off):
        if name not in ROWS:
            raise AskError(f"there is no optimization {name!r}", field="on/off", hint=did_you_mean(name, ROWS))
    asked = {}
    for row in TABLE:
        said = {flag for flag, names in ((True, config.on), (False, config.off)) if row.name in names}
        value = getattr(config, row.field) if row.field else None
        if value is not None and value != getattr(Config(), row.field or ""):
            said.add(row.means_on(value))
        if len(said) > 1:
            raise AskError("is switched both on and off", field=row.name, hint="say it once")
        if said:
            asked[row.name] = said.pop()
    return asked


def _why_not(row: Row, facts: Facts, dtype: str, decided: dict[str, Decision]) -> str | None:
    if sentence := row.needs(facts, dtype):
        return sentence
    for name in row.requires:
        if not any(decided[one].on for one in name.split(" or ")):
            return f"{name} is off"
    for name, why in row.excludes:
        if decided[name].on:
            return f"{name} is on: {why}"
    if row.kernels:
        infos = [info for room in facts.inventory.values() for info in room if info.name in row.kernels]
        reasons = [info.needs(facts.hardware, dtype) for info in infos]
        if all(reasons):
            return reasons[0] if reasons else f"no op has a kernel {row.kernels[0]}"
    if row.fuses and row.fuses not in facts.inventory:
        return f"there is no op {row.fuses}"
    return None


def row_of_kernel(kernel: str) -> Row | None:
    """The row without which a kernel of this name is not chosen."""
    return next((row for row in TABLE if kernel in row.kernels), None)
