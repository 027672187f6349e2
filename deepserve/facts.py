"""What is true: the machine, the checkpoint on disk, the kernels that exist. Gathered once, plain values, no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from deepserve.architecture import Architecture, load_architecture, read_architecture
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.hardware import Hardware, this_cpu, this_machine
from deepserve.ops.inventory import KernelInfo, inventory

KNOWN_MODELS = Path(__file__).with_name("known_models.json")
HUB = Path("~/.cache/huggingface/hub")
MAX_HEADER_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What lies in the model's directory. `path` is None where only the architecture is known (by name)."""

    path: str | None
    has_tokenizer: bool = False
    num_files: int = 0
    tensor_bytes: dict[str, int] = field(default_factory=dict)  # by safetensors dtype: BF16, F8_E4M3, F32 ...
    generation_config: dict[str, Any] = field(default_factory=dict)

    @property
    def has_weights(self) -> bool:
        """Whether there are safetensors files."""
        return self.num_files > 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(self.tensor_bytes.values())


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
    """Reads the headers of a directory's safetensors files, not their tensors. AskError names a broken file."""
    sizes: dict[str, int] = {}
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        for dtype, num_bytes in _header_bytes(file).items():
            sizes[dtype] = sizes.get(dtype, 0) + num_bytes
    return Checkpoint(
        path=str(path),
        has_tokenizer=((tokenizer or path) / "tokenizer.json").is_file(),
        num_files=len(files),
        tensor_bytes=sizes,
        generation_config=_generation_config(path / "generation_config.json"),
    )


def _header_bytes(file: Path) -> dict[str, int]:
    """Bytes by dtype that a safetensors file says it holds; the sum must be what follows its header."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header says {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        sizes: dict[str, int] = {}
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - start
        if sum(sizes.values()) != size - 8 - length:
            raise ValueError(f"its header describes {sum(sizes.values())} bytes of tensors, {size - 8 - length} follow")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise AskError(f"{file} is broken: {error}", field="model", hint="download the file again") from None
    return sizes


def _generation_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AskError(f"{file} is not valid JSON: {error}", field="model") from None
    if not isinstance(config, dict):
        raise AskError(f"{file} holds no object", field="model")
    return config
