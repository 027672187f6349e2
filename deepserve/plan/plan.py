"""The plan: everything that was decided before the first tensor, and what it costs in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from deepserve.architecture import Architecture
from deepserve.errors import AskError
from deepserve.hardware import Hardware
from deepserve.plan.graphs import GraphSizes
from deepserve.plan.memory import MemoryMap
from deepserve.plan.parameters import Parameters
from deepserve.speculation import Speculation


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision: what, which value, why, and what else there was with the reason that it was not taken."""

    name: str
    value: str
    reason: str
    refused: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Blocker:
    """Why this plan can be printed but not run here, and what would help."""

    field: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """What a run records about itself: a timeline of steps, perhaps with ops, and the shapes that ops see."""

    trace_file: str = ""
    trace_ops: bool = False
    shapes_dir: str = ""


@dataclass(frozen=True)
class Plan:
    """Nothing in it is left on "auto". Sizes are in tokens or bytes, memory is that of one device."""

    model: str  # as it was asked for
    model_path: str | None  # the directory; None where only the architecture is known
    tokenizer_path: str | None
    served_model_name: tuple[str, ...]
    architecture: Architecture
    parameters: Parameters
    hardware: Hardware
    device: str  # cpu or cuda
    num_threads: int  # of a CPU; 1 host thread beside a GPU
    dtype: str  # bf16, fp16 or fp32
    kv_dtype: str
    load_format: str  # safetensors or dummy
    tensor_parallel_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    graphs: GraphSizes  # steps that are recorded
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    enable_prefix_caching: bool
    scheduling_policy: str
    async_depth: int  # steps scheduled ahead: 0 or 1
    speculation: Speculation | None
    max_num_queued_reqs: int | None
    stream_interval: int
    max_logprobs: int
    kernels: dict[str, str]  # op -> kernel
    optimizations: dict[str, bool]  # row -> on
    default_sampling: dict[str, Any]  # SamplingParams fields that the checkpoint's generation_config.json sets
    memory: MemoryMap
    choices: tuple[Choice, ...]
    blockers: tuple[Blocker, ...]
    seed: int
    recording: Recording

    @property
    def fusions(self) -> set[str]:
        """The fused ops that the graph rewriting may put in."""
        return {name.removeprefix("fusion_") for name, on in self.optimizations.items() if on and "fusion_" in name}

    @property
    def num_drafts(self) -> int:
        """Tokens that are guessed for a request in a step, at most."""
        return self.speculation.num_tokens if self.speculation else 0

    @property
    def with_mtp(self) -> bool:
        """Whether the checkpoint's MTP layer is loaded: it guesses tokens."""
        return self.speculation is not None and self.speculation.method == "mtp"

    @property
    def hash(self) -> str:
        """Twelve hex digits of what is run: equal for equal decisions, whatever the reasons and the free memory."""
        decided = {name: value for name, value in self._decided().items() if name not in ("model", "memory")}
        text = json.dumps(decided, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def log_lines(self) -> tuple[str, str]:
        """The two sentences that people and their scripts look for in a log."""
        return (
            f"GPU KV cache size: {self.memory.num_tokens:,} tokens",
            f"Maximum concurrency for {self.max_model_len:,} tokens per request: {self.memory.concurrency:.2f}x",
        )

    def refuse_blockers(self) -> None:
        """AskError if this plan can only be looked at: another machine's, without weights, or not built yet."""
        for blocker in self.blockers:
            raise AskError(blocker.message, field=blocker.field, hint=blocker.hint)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, with its hash."""
        return {
            **self._decided(),
            "choices": [dataclasses.asdict(choice) for choice in self.choices],
            "blockers": [dataclasses.asdict(blocker) for blocker in self.blockers],
            "hash": self.hash,
        }

    def _decided(self) -> dict[str, Any]:
        skipped = ("choices", "blockers", "hardware", "memory", "recording")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        fields["architecture"] = dataclasses.asdict(self.architecture)
        fields["parameters"] = {**dataclasses.asdict(self.parameters), "total": self.parameters.total}
        fields["hardware"] = {"name": self.hardware.name, "arch": self.hardware.arch, "count": self.hardware.count}
        fields["memory"] = dataclasses.asdict(self.memory)
        fields["graphs"] = dataclasses.asdict(self.graphs)
        fields["speculation"] = dataclasses.asdict(self.speculation) if self.speculation else None
        return json.loads(json.dumps(fields))
