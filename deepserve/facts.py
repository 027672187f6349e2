"""What is true: the machine, the checkpoint on disk, the kernels that exist. Gathered once, plain values, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from deepserve.architecture import Architecture, load_architecture, read_architecture
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.hardware import Hardware, this_cpu, this_machine
from deepserve.json_file import read_object
from deepserve.ops.inventory import KernelInfo, inventory

KNOWN_MODELS = Path(__file__).with_name("known_models.json")
HUB = Path("~/.cache/huggingface/hub")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What lies in the model's directory. `path` is None where only the architecture is known (by name)."""

    path: str | None
    has_tokenizer: bool = False
    has_weights: bool = False  # whether there are safetensors files
    generation_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the plan may depend on besides the Config. `hypothetical`: the hardware is not this machine."""

    hardware: Hardware
    architecture: Architecture
    checkpoint: Checkpoint
    inventory: Mapping[str, tuple[KernelInfo, ...]]
    hypothetical: bool = False


def gather_facts(config: Config, hardware: Hardware | None = None) -> Facts:
    """Looks at the disk and at this machine, or takes `hardware` in its place. AskError where the model is no model."""
    path, architecture = find_model(config.model)
    here = hardware or (this_cpu() if config.device == "cpu" else this_machine())
    tokenizer = Path(config.tokenizer) if config.tokenizer else path
    if config.tokenizer and not (Path(config.tokenizer) / "tokenizer.json").is_file():
        raise AskError(f"{config.tokenizer} holds no tokenizer.json", field="tokenizer")
    checkpoint = read_checkpoint(path, tokenizer) if path else Checkpoint(None)
    return Facts(here, architecture, checkpoint, inventory(), hypothetical=hardware is not None)


def find_model(model: str) -> tuple[Path | None, Architecture]:
    """The model's directory and architecture: a directory, a config.json, a name in the hub's cache, or known."""
    if not model:
        raise AskError("is missing", field="model", hint="give the directory of a checkpoint")
    path = Path(model).expanduser()
    if path.exists():
        return (path if path.is_dir() else path.parent), load_architecture(path)
    if snapshot := _cached_snapshot(model):
        return snapshot, load_architecture(snapshot)
    known = known_models()
    key = model.rstrip("/").split("/")[-1].lower()
    if key in known:
        return None, read_architecture(known[key])
    raise AskError(
        f"{model!r} is neither a directory nor in {HUB}",
        field="model",
        hint=f"download it first; `deepserve plan` also knows {', '.join(known)} without a checkpoint",
    )


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """config.json of well-known models by lower-case name, so that they can be planned with nothing on the disk."""
    known: dict[str, dict[str, Any]] = json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))
    for config in known.values():  # a model may be "like" an earlier one
        for key, value in known.get(config.pop("like", ""), {}).items():
            config.setdefault(key, value)
    return known


def _cached_snapshot(model: str) -> Path | None:
    """The newest snapshot of `owner/name` that huggingface_hub has downloaded to its default place."""
    if model.count("/") != 1 or ".." in model:
        return None
    snapshots = (HUB.expanduser() / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json")
    return max((file.parent for file in snapshots), key=lambda folder: folder.stat().st_mtime, default=None)


def read_checkpoint(path: Path, tokenizer: Path | None = None) -> Checkpoint:
    """Looks at what is there; the weights are read where they are loaded. AskError names a broken file."""
    return Checkpoint(
        path=str(path),
        has_tokenizer=((tokenizer or path) / "tokenizer.json").is_file(),
        has_weights=any(path.glob("*.safetensors")),
        generation_config=read_object(path / "generation_config.json", "model"),
    )
