"""`deepserve docs DIRECTORY`: writes the reference pages from the tables in the code that they describe."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args, get_origin

from deepserve import metrics
from deepserve.architecture import FAMILIES
from deepserve.cli.flags import GROUPS
from deepserve.compilation import FIELDS
from deepserve.config import Config, field_types, knobs, optional_of
from deepserve.facts import find_model, known_models
from deepserve.hardware import GIB, TABLE, Hardware
from deepserve.kv_cache.spec import bytes_per_token, cache_specs
from deepserve.ops.inventory import inventory
from deepserve.optimizations import EXACTNESS
from deepserve.optimizations import TABLE as ROWS
from deepserve.plan.parameters import count_parameters
from deepserve.plan.text import billions
from deepserve.spellings import NO_EFFECT, REFUSED, SAME, SIMILAR, flag

HEAD = "<!-- Written by `make docs` from the code; a test checks that it is current. -->\n\n"
KINDS = {int: "integer", float: "number", str: "text", bool: "switch", tuple: "names", dict: "JSON or key=value"}
DEVICES = ("mi300x", "mi355x", "h100")


def run(argv: list[str]) -> int:
    """Write every page and say so; 0."""
    parser = argparse.ArgumentParser(prog="deepserve docs", description="write the generated reference pages")
    parser.add_argument("directory", type=Path, nargs="?", default=Path("docs/reference"))
    directory = parser.parse_args(argv).directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
        print(directory / name)
    return 0


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    made = {
        "flags.md": _flags(),
        "optimizations.md": _optimizations(),
        "ops.md": _ops(),
        "models.md": _models(),
        "hardware.md": _hardware(),
        "metrics.md": _metrics(),
    }
    return {name: HEAD + text.rstrip() + "\n" for name, text in made.items()}


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n\n"
    )


def _code(*names: str) -> str:
    return " ".join(f"`{name}`" for name in names)


def _flags() -> str:
    text = (
        "# Flags\n\nEvery flag is a field of `Config` (`LLM(model, max_model_len=4096)` takes the same names).\n"
        "Dashes and underscores are alike, and a switch `--enable-x` has `--disable-x`, `--no-enable-x`, `--x` and\n"
        "`--no-x`; `8k` is 8,000 and `8K` is 8,192; `--config FILE` reads YAML, TOML or JSON whose keys are these\n"
        "names, and `--print-config` prints such a file. No environment variable is read.\n\n"
    )
    default = dataclasses.asdict(Config())
    for group, meaning in GROUPS.items():
        rows = []
        for name, knob in knobs().items():
            if knob.group == group:
                kind, optional = optional_of(field_types()[name])
                shown = "" if default[name] in (None, "", (), {}) else _code(str(default[name]))
                inner = "integers" if get_args(kind) == (int, ...) else KINDS[get_origin(kind) or kind]
                limits = ", ".join(_code(choice) for choice in knob.choices) or inner
                rows.append(
                    [
                        _code(flag(name), *knob.flags),
                        limits,
                        shown or ("the plan chooses" if optional else ""),
                        knob.help,
                    ]
                )
        text += f"## {group}: {meaning}\n\n" + _table(("flag", "values", "default", "meaning"), rows)
    text += "## Flags of other engines\n\n### Accepted, without effect\n\nA line says so whenever one is used.\n\n"
    text += _table(("flag", "why it changes nothing"), [(_code(name), why) for name, (_, why) in NO_EFFECT.items()])
    text += "Of `--compilation-config` (`-cc`), JSON or `-cc.key=value`, the keys " + ", ".join(map(_code, FIELDS))
    text += " are the flags of these names; its other\nkeys are for a compiler and change nothing.\n\n"
    text += "### Accepted under another name\n\n"
    text += _table(("flag", "the same as"), [(_code(name), _code(same)) for name, same in SAME.items()])
    text += "### Refused\n\n"
    refused = [(_code(name), _code(*harmless), why) for name, (_, harmless, why) in REFUSED.items()]
    text += _table(("flag", "accepted values", "otherwise"), refused)
    return text + _table(("flag", "look at"), [(_code(name), near) for name, near in SIMILAR.items()])


def _optimizations() -> str:
    rows = []
    for row in ROWS:
        needs = [*(f"{name} on" for name in row.requires), *(f"{name} off" for name, _ in row.excludes)]
        default = {"on": "on where it can be", "gpu": "on with a GPU", "off": "off"}[row.default]
        rows.append([_code(row.name), row.sentence, row.exactness, default, ", ".join(needs), row.counter])
    text = (
        "# Optimizations\n\n`--on name` and `--off name` switch a row; `deepserve plan` says why each is on or off.\n\n"
    )
    text += _table(("row", "what it does", "exactness", "default", "needs", "its counter counts"), rows)
    meanings = [(_code(name), meaning) for name, meaning in EXACTNESS.items()]
    return text + "With a row on and off an engine gives:\n\n" + _table(("exactness", "meaning"), meanings)


def _ops() -> str:
    rows = []
    for name, infos in inventory().items():
        about = (importlib.import_module(f"deepserve.ops.{name}").__doc__ or "").strip().splitlines()[0]
        for info in infos:
            where = [TABLE[device].name for device in DEVICES if info.needs(TABLE[device], "bf16") is None]
            for kind, cpu in _cpus().items():
                if info.needs(cpu, "fp32") is None:
                    where.insert(0, kind)
                    break
            places = ", ".join(where)
            first = info is infos[0]
            rows.append(
                [_code(name) if first else "", about if first else "", _code(info.name), info.exactness, places]
            )
    text = "# Ops and kernels\n\nThe reference, plain PyTorch, defines an op; the plan takes the last kernel that can\n"
    text += "run. Exactness is against the reference.\n\n"
    return text + _table(("op", "what it computes", "kernel", "exactness", "runs on"), rows)


def _cpus() -> dict[str, Hardware]:
    """From the most modest on."""
    plain = dataclasses.replace(TABLE["h100"], name="a CPU", kind="cpu", arch="x86_64", features=frozenset({"avx512f"}))
    features, tools = plain.features | {"avx512_bf16"}, frozenset({"gcc", "libgomp"})
    return {"CPU": plain, "CPU with AVX-512 BF16 and gcc": dataclasses.replace(plain, features=features, tools=tools)}


def _models() -> str:
    rows = []
    for name in known_models():
        architecture = find_model(name)[1]
        counted = count_parameters(architecture)
        cached = bytes_per_token(cache_specs(architecture, "bf16"))
        rows.append(
            [_code(name), architecture.family, billions(counted.total), billions(counted.active), f"{cached:,}",
             f"{architecture.max_position_embeddings:,}"]
        )  # fmt: skip
    text = f"# Models\n\nServed `model_type`s: {', '.join(map(_code, FAMILIES))}.\n\n"
    text += "`deepserve plan NAME --hardware mi300x:8` knows these by name, without a checkpoint:\n\n"
    return text + _table(
        ("name", "model_type", "parameters", "active a token", "KV bytes a token (bf16)", "positions"), rows
    )


def _hardware() -> str:
    rows = [
        [_code(key), row.name, row.arch, f"{row.memory_bytes / GIB:.1f}", f"{row.bandwidth / 1e12:.2f}",
         f"{row.flops['bf16'] / 1e12:,.0f}", f"{row.flops['fp8'] / 1e12:,.0f}"]
        for key, row in TABLE.items()
    ]  # fmt: skip
    text = "# Hardware\n\nWhat `--hardware NAME:COUNT` knows. Memory as drivers report it, rates as data sheets do.\n\n"
    return text + _table(("name", "device", "architecture", "GiB", "TB/s", "bf16 TFLOP/s", "fp8 TFLOP/s"), rows)


def _metrics() -> str:
    text = "# Metrics\n\n`GET /metrics`, by vLLM's names (what it does not measure: `deepserve:`); Prometheus adds\n"
    text += "`_total` to counters.\n\n"
    for title, group in (
        ("engine", metrics.ENGINE_METRICS),
        ("requests", metrics.REQUEST_METRICS),
        ("HTTP", metrics.HTTP_METRICS),
    ):
        rows = [[_code(m.name, *m.aliases), m.kind, m.help, _code(*m.labels)] for m in group.values()]
        text += f"## {title}\n\n" + _table(("metric", "kind", "meaning", "labels of its own"), rows)
    return text
