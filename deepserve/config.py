"""What was asked: every knob, its default and its meaning. The flags, the recipes and `LLM(...)` are made from this."""

from __future__ import annotations

import dataclasses
import functools
import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from deepserve import compilation, speculation
from deepserve.errors import AskError


@dataclass(frozen=True, slots=True)
class Knob:
    """What a field of Config means: the help text, where it is listed, its range, and its short and other flags."""

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # besides --its-name: short forms and spellings of other engines with the same meaning


def _knob(default: Any, group: str, text: str, **more: Any) -> Any:
    knob = Knob(group, text, **more)
    return dataclasses.field(default=default, metadata={"knob": knob})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a user may ask for. None and "auto" leave the choice to the plan, which says what it chose and why.

    Types and ranges are checked here (AskError names the field); what depends on the model or the machine, by the plan.
    """

    model: str = _knob(
        "", "model", "directory of the checkpoint, or its config.json", flags=("--model-path", "--model-id")
    )
    tokenizer: str | None = _knob(
        None, "model", "directory of the tokenizer, the checkpoint's by default", flags=("--tokenizer-path",)
    )
    served_model_name: tuple[str, ...] = _knob(
        (), "model", "names that the API answers to, the first in responses; the model's path by default"
    )
    dtype: str = _knob(
        "auto",
        "model",
        "what is computed in; auto is the checkpoint's, where the machine is fast in it",
        choices=("auto", "bfloat16", "bf16", "float16", "half", "fp16", "float32", "float", "fp32"),
    )
    device: str = _knob("auto", "model", "where it runs", choices=("auto", "cpu", "cuda"))
    load_format: str = _knob(
        "auto",
        "model",
        "dummy makes random weights, to measure without a checkpoint",
        choices=("auto", "safetensors", "dummy"),
    )
    quantization: str | None = _knob(
        None, "model", "must agree with what the checkpoint's config.json says", flags=("-q",)
    )
    max_model_len: int | None = _knob(
        None,
        "model",
        "most tokens of a request, prompt and answer; auto is the model's limit, or what fits",
        low=1,
        high=2**31,
        flags=("--context-length", "--ctx-size"),
    )
    seed: int = _knob(
        0, "model", "of dummy weights and of requests without a seed", low=0, high=2**63 - 1, flags=("--random-seed",)
    )
    generation_config: str = _knob(
        "auto",
        "model",
        "auto: sampling defaults of the checkpoint; vllm: none but the API's own",
        choices=("auto", "vllm"),
    )

    block_size: int | None = _knob(
        None, "memory", "tokens in a block of the KV cache", low=1, high=1024, flags=("--page-size",)
    )
    kv_cache_dtype: str = _knob(
        "auto", "memory", "auto: the dtype that is computed in; fp8 or fp8_e4m3: latents in FP8"
    )
    gpu_memory_utilization: float = _knob(0.92, "memory", "share of a GPU's memory to use", low=0.05, high=1.0)
    kv_cache_memory_bytes: int | None = _knob(
        None, "memory", "bytes of KV cache a device, instead of what is free", low=1
    )
    num_gpu_blocks_override: int | None = _knob(None, "memory", "blocks of KV cache, instead of what fits", low=1)
    enable_prefix_caching: bool = _knob(True, "memory", "reuse the KV cache of common prompt beginnings")

    max_num_seqs: int | None = _knob(
        None, "scheduling", "most requests in a step", low=1, high=65536, flags=("--max-running-requests",)
    )
    max_num_batched_tokens: int | None = _knob(None, "scheduling", "most tokens in a step", low=1, high=2**24)
    enable_chunked_prefill: bool = _knob(True, "scheduling", "let a long prompt span several steps")
    long_prefill_token_threshold: int = _knob(
        0, "scheduling", "most prompt tokens of one request in a step; 0: no such limit", low=0, high=2**24
    )
    scheduling_policy: str = _knob(
        "fcfs", "scheduling", "order of waiting requests", choices=("fcfs", "priority"), flags=("--schedule-policy",)
    )
    async_scheduling: bool | None = _knob(None, "scheduling", "schedule a step while the one before it runs")
    cudagraph_mode: str | None = _knob(
        None,
        "scheduling",
        "which steps are recorded and replayed: those of one token a request (FULL_DECODE_ONLY), mixed ones too "
        "(FULL), any in pieces between attentions (PIECEWISE); FULL_AND_PIECEWISE where it can be",
        choices=tuple(compilation.MODES),
    )
    cudagraph_capture_sizes: tuple[int, ...] = _knob(
        (), "scheduling", "sizes that are recorded, in rows and in tokens; the plan's own otherwise", low=1
    )
    max_cudagraph_capture_size: int | None = _knob(None, "scheduling", "the largest of the plan's own sizes", low=1)
    speculative_config: dict[str, Any] | None = dataclasses.field(
        default=None,
        metadata={
            "knob": Knob(
                "scheduling", "who guesses tokens (method mtp or ngram) and how many a step (num_speculative_tokens)"
            )
        },
    )
    max_num_queued_reqs: int | None = _knob(
        None, "scheduling", "refuse requests with 429 above so many waiting", low=1, flags=("--max-queued-requests",)
    )
    stream_interval: int = _knob(1, "scheduling", "tokens between two streamed messages", low=1, high=1024)

    tensor_parallel_size: int = _knob(
        1, "parallel", "GPUs that share every layer", low=1, high=1024, flags=("-tp", "--tp", "--tp-size")
    )

    on: tuple[str, ...] = _knob((), "optimizations", "switch these on (see docs/reference/optimizations.md)")
    off: tuple[str, ...] = _knob((), "optimizations", "switch these off")
    kernels: dict[str, str] = dataclasses.field(
        default_factory=dict,
        metadata={"knob": Knob("optimizations", "kernel of an op, as in --kernels.rms_norm reference")},
    )

    trace_file: str = _knob("", "recording", "write a timeline of every step to this file, for ui.perfetto.dev")
    trace_ops: bool = _knob(False, "recording", "with every call of an op in it; no step is replayed")
    capture_shapes: str = _knob(
        "",
        "recording",
        "write to this directory what ops are called with, for --replay of bench ops and tune; no step is replayed",
    )

    host: str | None = _knob(None, "server", "address to listen on: 127.0.0.1, or all with --api-key")
    port: int = _knob(8000, "server", "port to listen on", low=0, high=65535, flags=("--server-port",))
    api_key: tuple[str, ...] = _knob((), "server", "keys that clients must send, any one of them")
    max_logprobs: int = _knob(20, "server", "most log-probabilities a request may ask for", low=0, high=20)
    shutdown_timeout: int = _knob(30, "server", "seconds that running requests get after SIGTERM", low=0, high=86400)
    log_level: str = _knob(
        "info",
        "server",
        "least severe line that is logged",
        choices=("debug", "info", "warning", "error"),
        flags=("--uvicorn-log-level",),
    )
    enable_log_requests: bool = _knob(False, "server", "log every request", flags=("--log-requests",))
    disable_log_stats: bool = _knob(False, "server", "no throughput line every 10 s")
    disable_uvicorn_access_log: bool = _knob(False, "server", "no line for every HTTP request")

    def __post_init__(self) -> None:
        for name, kind in field_types().items():
            value = _settle(name, getattr(self, name), kind)
            if name == "cudagraph_mode" and value is not None:
                value = value.upper()
            object.__setattr__(self, name, value)
            _check_range(name, value, knobs()[name])
        object.__setattr__(self, "speculative_config", speculation.settle(self.speculative_config or {}) or None)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values: `Config(**json.loads(json.dumps(config.to_dict())))` is the same Config."""
        return dataclasses.asdict(self)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        default = Config()
        return {name: value for name, value in self.to_dict().items() if value != getattr(default, name)}


@functools.cache
def knobs() -> dict[str, Knob]:
    """The meaning of every field, in order."""
    return {field.name: field.metadata["knob"] for field in dataclasses.fields(Config)}


@functools.cache
def field_types() -> dict[str, Any]:
    """The annotated type of every field."""
    return get_type_hints(Config)


def optional_of(kind: Any) -> tuple[Any, bool]:
    """(X, True) for X | None, else (the type, False)."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(arm for arm in get_args(kind) if arm is not type(None)), True
    return kind, False


def _settle(name: str, value: Any, kind: Any) -> Any:
    """The value in the type of its field, or AskError. -1 and "auto" mean None where a field may be None."""
    kind, optional = optional_of(kind)
    if value is None or (optional and kind is int and value in (-1, "auto")):
        if optional:
            return None
        raise AskError("is None", field=name, hint="leave it out for the default")
    if get_origin(kind) is tuple:
        of_integers = get_args(kind)[0] is int
        items = [value] if isinstance(value, int if of_integers else str) else value
        fits = _is_integer if of_integers else _is_text
        if not isinstance(items, list | tuple) or not all(map(fits, items)):
            raise AskError(f"is {value!r}, expected {'integers' if of_integers else 'texts'}", field=name)
        return tuple(items)
    if get_origin(kind) is dict:
        inner = str if get_args(kind)[1] is str else object
        if not isinstance(value, dict) or not all(
            isinstance(k, str) and isinstance(v, inner) for k, v in value.items()
        ):
            raise AskError(f"is {value!r}, expected {'texts' if inner is str else 'values'} by name", field=name)
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise AskError(f"is {value!r}, expected {kind.__name__}", field=name)
    return value


def _is_integer(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _is_text(item: Any) -> bool:
    return isinstance(item, str) and item != ""


def _check_range(name: str, value: Any, knob: Knob) -> None:
    if knob.choices and value is not None and value not in knob.choices:
        raise AskError(f"is {value!r}", field=name, hint=f"one of {', '.join(knob.choices)}")
    if isinstance(value, tuple):
        for item in value:
            _check_range(name, item, knob)
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not (knob.low is None or value >= knob.low) or not (knob.high is None or value <= knob.high):
        limits = f"from {knob.low} to {knob.high}" if knob.high is not None else f"at least {knob.low}"
        raise AskError(f"is {value}, expected {limits}", field=name)
