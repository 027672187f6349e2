"""vLLM's compilation config: its keys about CUDA graphs are fields of Config; for all others there is no compiler."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deepserve.errors import AskError, did_you_mean

FIELD = "compilation_config"
FIELDS = ("cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size")
NO_COMPILER = "there is no compiler"
# vLLM's CUDA graph modes, and the optimizations that are on where one of them is asked for; others of these are off
MODES: dict[str, tuple[str, ...]] = {
    "NONE": (),
    "PIECEWISE": ("piecewise_graphs",),
    "FULL": ("cuda_graphs", "mixed_graphs"),
    "FULL_DECODE_ONLY": ("cuda_graphs",),
    "FULL_AND_PIECEWISE": ("cuda_graphs", "piecewise_graphs"),
}
GRAPH_ROWS = frozenset(name for names in MODES.values() for name in names)
# keys of a compiler, and of how graphs are recorded
NO_EFFECT = frozenset(
    "mode level backend custom_ops splitting_ops use_inductor compile_sizes compile_ranges_split_points "
    "compile_mm_encoder inductor_compile_config inductor_passes pass_config use_inductor_graph_partition cache_dir "
    "dynamic_shapes_config compile_cache_save_format debug_dump_path fast_moe_cold_start cudagraph_num_of_warmups "
    "cudagraph_copy_inputs cudagraph_specialize_lora".split()
)
OLD: dict[tuple[str, bool], str | None] = {  # switches of older versions, and the cudagraph_mode that they stand for
    ("full_cuda_graph", True): "FULL", ("full_cuda_graph", False): None,
    ("use_cudagraph", True): None, ("use_cudagraph", False): "NONE",
}  # fmt: skip


def read(asked: Any) -> tuple[dict[str, Any], list[str]]:
    """A compilation config (an object, its JSON, or a level) as fields of Config, and a line for what has no effect.

    AskError for a key that vLLM has not either.
    """
    asked = _value(asked)
    if asked is None or (isinstance(asked, int) and not isinstance(asked, bool)):
        return {}, [] if asked is None else [_no_effect(FIELD)]
    if not isinstance(asked, Mapping):
        raise AskError(f"{asked!r} is no JSON object", field=FIELD)
    fields, lines = {}, []
    for key, value in asked.items():
        value = _value(value)
        if key in FIELDS:
            fields[key] = value
        elif isinstance(value, bool) and (key, value) in OLD:
            fields["cudagraph_mode"] = OLD[key, value]
        elif key.partition(".")[0] in NO_EFFECT:
            lines.append(_no_effect(f"{FIELD}.{key}"))
        else:
            raise AskError("is not an option", field=f"{FIELD}.{key}", hint=did_you_mean(key, (*FIELDS, *NO_EFFECT)))
    return {key: value for key, value in fields.items() if value is not None}, lines


def _value(text: Any) -> Any:
    """What a text says as JSON, if it is any."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _no_effect(name: str) -> str:
    return f"accepted, no effect: {name} ({NO_COMPILER})"
