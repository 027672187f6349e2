"""Flags of other engines: what is accepted because it changes nothing here, what is refused, what it is called here.

The names are those of vLLM, SGLang, ATOM and llama.cpp: scripts made for those start this one, or are told why not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from deepserve import compilation
from deepserve.config import Config, knobs
from deepserve.errors import AskError

_PROMPTS = "the prompt format, tools and reasoning follow the checkpoint"
_COMPILER = f"{compilation.NO_COMPILER}; --cudagraph-mode says which steps are recorded"
_SIZES = "the plan chooses sizes up to --max-num-seqs; --cudagraph-capture-sizes overrides them"
_KERNELS = "the plan chooses kernels from its own table; --kernels overrides it"
_ONE_DEVICE = "one process drives one device"
_TEXT = "only text is served"

# flag -> (number of values: 0, 1 or "+", why it changes nothing)
NO_EFFECT: dict[str, tuple[int | str, str]] = {
    "--trust-remote-code": (0, "code that comes with a checkpoint is never run"),
    "--tokenizer-mode": (1, _PROMPTS),
    "--tool-call-parser": (1, _PROMPTS),
    "--reasoning-parser": (1, _PROMPTS),
    "--enable-auto-tool-choice": (0, _PROMPTS),
    "--chat-template-content-format": (1, _PROMPTS),
    "--optimization-level": (1, _COMPILER),
    "--performance-mode": (1, _COMPILER),
    "--cuda-graph-max-bs": (1, _SIZES),
    "--cuda-graph-bs": ("+", _SIZES),
    "--no-enforce-eager": (0, "steps are recorded where they can be"),
    "--level": (1, _COMPILER),
    "--attention-backend": (1, _KERNELS),
    "--attention-config": (1, _KERNELS),
    "--moe-backend": (1, _KERNELS),
    "--moe-runner-backend": (1, _KERNELS),
    "--all2all-backend": (1, _ONE_DEVICE),
    "--enable-expert-parallel": (0, "the memory of whole experts and of slices of them is the same"),
    "--no-enable-expert-parallel": (0, _ONE_DEVICE),
    "--disable-custom-all-reduce": (0, _ONE_DEVICE),
    "--distributed-executor-backend": (1, _ONE_DEVICE),
    "--num-continuous-decode-steps": (1, "the host schedules every step"),
    "--max-prefill-tokens": (1, "--max-num-batched-tokens bounds prompts too"),
    "--prefill-schedule-interval": (1, "prompts are scheduled in every step"),
    "--safetensors-load-strategy": (1, "shards are always streamed"),
    "--disable-log-requests": (0, "requests are logged only with --enable-log-requests"),
    "--swap-space": (1, "preempted requests are computed again, never swapped"),
    "--limit-mm-per-prompt": (1, _TEXT),
    "--language-model-only": (0, _TEXT),
}

_NOT_BUILT = "is not built yet"

# flag -> (number of values, the values that ask for nothing, why all others are refused)
REFUSED: dict[str, tuple[int | str, tuple[str, ...], str]] = {
    "--pipeline-parallel-size": (1, ("1",), f"pipeline parallelism {_NOT_BUILT}"),
    "--data-parallel-size": (1, ("1",), f"data parallelism {_NOT_BUILT}"),
    "--decode-context-parallel-size": (1, ("1",), f"context parallelism {_NOT_BUILT}"),
    "--prefill-context-parallel-size": (1, ("1",), f"context parallelism {_NOT_BUILT}"),
    "--expert-parallel-size": (1, ("1",), f"expert parallelism {_NOT_BUILT}"),
    "--enable-dp-attention": (0, (), f"data-parallel attention {_NOT_BUILT}"),
    "--enable-eplb": (0, (), f"expert load balancing {_NOT_BUILT}"),
    "--eplb-config": (1, (), f"expert load balancing {_NOT_BUILT}"),
    "--kv-transfer-config": (1, (), f"disaggregated prefill {_NOT_BUILT}"),
    "--disaggregation-mode": (1, ("null",), f"disaggregated prefill {_NOT_BUILT}"),
    "--speculative-draft-model-path": (1, (), "no second model is loaded: --spec-method mtp or ngram need none"),
    "--speculative-eagle-topk": (1, ("1",), "one guess a position is verified, not a tree of them"),
    "--quantization-config": (1, (), "weights are served as the checkpoint's config.json describes them"),
    "--enable-lora": (0, (), "adapters are not served"),
    "--cpu-offload-gb": (1, ("0",), "weights are not offloaded"),
    "--hf-overrides": (1, ("{}",), "config.json is taken as it is; edit it in a copy of the checkpoint"),
    "--revision": (1, (), "nothing is downloaded; give the directory of the checkpoint"),
    "--download-dir": (1, (), "nothing is downloaded; give the directory of the checkpoint"),
    "--headless": (0, (), f"serving on several hosts {_NOT_BUILT}"),
    "--nnodes": (1, ("1",), f"serving on several hosts {_NOT_BUILT}"),
}

# the same thing under another name: flag -> flag here, with the key inside it, or with its value
SAME = {
    "-pp": "--pipeline-parallel-size",
    "--pp": "--pipeline-parallel-size",
    "--pp-size": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "--dp": "--data-parallel-size",
    "--dp-size": "--data-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-ep": "--enable-expert-parallel",
    "--ep": "--expert-parallel-size",
    "--ep-size": "--expert-parallel-size",
    "-sc": "--speculative-config",
    "--spec-method": "--speculative-config.method",
    "--spec-tokens": "--speculative-config.num_speculative_tokens",
    "--method": "--speculative-config.method",
    "--num-speculative-tokens": "--speculative-config.num_speculative_tokens",
    "--speculative-algorithm": "--speculative-config.method",
    "--speculative-num-steps": "--speculative-config.num_speculative_tokens",
    "--spec-model": "--speculative-draft-model-path",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-O": "--optimization-level",
    "--enable-radix-cache": "--enable-prefix-caching",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--disable-overlap-schedule": "--no-async-scheduling",
    "--enforce-eager": "--cudagraph-mode=NONE",
    "--disable-cuda-graph": "--cudagraph-mode=NONE",
    "--no-cuda-graphs": "--cudagraph-mode=NONE",
    "--cuda-graphs": "--cudagraph-mode=FULL_AND_PIECEWISE",
}

# a similar thing: flag -> what to look at
SIMILAR = {
    "--mem-fraction-static": "--gpu-memory-utilization, whose share holds the workspace too",
    "--chunked-prefill-size": "--max-num-batched-tokens, which bounds the whole step",
    "--max-total-tokens": "--num-gpu-blocks-override, in blocks",
    "--load-dummy": "--load-format dummy",
    "--hf-path": "the directory of the checkpoint in the place of MODEL",
    "--parallel": "--max-num-seqs",
    "-np": "--max-num-seqs",
    "-c": "--max-model-len",
    "-m": "--model",
    "--n-gpu-layers": "--device cuda; a model is on one device as a whole",
    "-ngl": "--device cuda; a model is on one device as a whole",
    "--batch-size": "--max-num-batched-tokens",
    "--alias": "--served-model-name",
    "--dtype-override": "--dtype",
    "--speculative-num-draft-tokens": "--speculative-num-steps, which is one less",
}


def flag(name: str) -> str:
    """A field's flag: max_model_len -> --max-model-len."""
    return "--" + name.replace("_", "-")


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """A hint for an unknown flag, whichever engine's spelling it resembles."""
    if unknown in SIMILAR:
        return f"here it is {SIMILAR[unknown]}"
    alike = {other: flag(name) for name, knob in knobs().items() for other in knob.flags}
    names = {**{name: name for name in known}, **SAME, **alike, **{name: name for name in (*NO_EFFECT, *REFUSED)}}
    close = difflib.get_close_matches(unknown, [*names, *SIMILAR], n=1, cutoff=0.6)
    if not close:
        return "--help lists what there is"
    return f"did you mean {names.get(close[0]) or SIMILAR[close[0]]}?"


def config_of(**asked: Any) -> tuple[Config, list[str]]:
    """A Config from keyword arguments in anybody's spelling, and a line for each that has no effect (the Python door).

    None asks for nothing. AskError for what is unknown or refused, with what it is called here.
    """
    graphs, lines = compilation.read(asked.pop(compilation.FIELD, None))
    fields: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}  # keys of fields that are JSON objects
    alike = {other: name for name, knob in knobs().items() for other in knob.flags}
    for name, value in asked.items():
        spelled = flag(name)
        if value is False and f"--no-{spelled[2:]}" in SAME:
            spelled, value = f"--no-{spelled[2:]}", True
        spelled, _, fixed = SAME.get(spelled, spelled).partition("=")
        spelled, _, key = spelled.partition(".")
        if fixed:
            if value:
                graphs = _joined(graphs, spelled[2:].replace("-", "_"), fixed)
        elif key:
            inside.setdefault(spelled[2:].replace("-", "_"), {}).update({} if value is None else {key: value})
        elif name in knobs():
            fields[name] = value
        elif spelled in alike:
            fields[alike[spelled]] = value
        elif (opposite := spelled.removeprefix("--no-").replace("-", "_")) in knobs() and spelled.startswith("--no-"):
            fields[opposite] = False if value else None
        elif spelled in NO_EFFECT:
            lines.append(f"accepted, no effect: {name} ({NO_EFFECT[spelled][1]})")
        elif spelled in REFUSED:
            _, harmless, why = REFUSED[spelled]
            if value not in (None, False) and str(value) not in harmless:
                raise AskError(why, field=name)
        else:
            hint = suggestion(spelled, map(flag, knobs())).replace("--", "").replace("-", "_")
            raise AskError("is not an option", field=name, hint=hint)
    for name, keys in inside.items():
        fields[name] = {**(fields.get(name) or {}), **keys}
    for name, value in graphs.items():
        fields = _joined(fields, name, value)
    return Config(**fields), lines


def _joined(fields: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The fields with one that another spelling may have set already. AskError where that is another value."""
    if fields.get(name) not in (None, (), value):
        raise AskError(f"is {fields[name]!r} and {value!r}", field=name, hint="say it once")
    return {**fields, name: value}
