"""Command-line flags, generated from the fields of Config; the spellings that people know from elsewhere work too."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from deepserve import compilation
from deepserve.config import Config, field_types, knobs, optional_of
from deepserve.errors import AskError
from deepserve.spellings import NO_EFFECT, REFUSED, SAME, flag, suggestion

UNITS = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
UNITS |= {f"{unit}iB": UNITS[unit] for unit in "KMG"}
GROUPS = {
    "model": "the model and its numbers",
    "memory": "memory and the KV cache",
    "scheduling": "how requests share steps",
    "parallel": "several GPUs",
    "optimizations": "switches; `deepserve plan` shows all of them with their reasons",
    "recording": "what a run records about itself",
    "server": "the HTTP server",
}


class FlagParser(argparse.ArgumentParser):
    """An argument parser that raises AskError, and neither abbreviates nor prints its usage for every mistake."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """AskError in the place of usage and exit."""
        raise AskError(message, hint=f"{self.prog} --help")


def config_from_args(argv: list[str], prog: str = "deepserve serve", description: str | None = None) -> Config:
    """The Config that a command line asks for; see `parse`."""
    return parse(argv, FlagParser(prog=prog, description=description))[0]


def parse(argv: list[str], parser: argparse.ArgumentParser) -> tuple[Config, argparse.Namespace]:
    """The Config of a verb's command line, and the verb's own arguments, which `parser` already has.

    Reads --config FILE first (flags override it), prints a line on stderr for each flag that has no effect, and after
    --print-config the resolved Config as TOML, then exits. AskError names a flag that is unknown, refused or wrong.
    """
    _add_flags(parser)
    known = set(parser._option_string_actions)
    names = parser.parse_args(_spell(argv, known))
    if names.config:
        names = parser.parse_args([*_spell(_read_config_file(Path(names.config)), known), *_spell(argv, known)])
    fields: dict[str, Any] = {name: value for name in knobs() if (value := getattr(names, name, None)) is not None}
    if names.model_argument:
        if fields.get("model", names.model_argument) != names.model_argument and "--model" in argv:
            raise AskError("is given twice", field="model")
        fields["model"] = names.model_argument
    for name in ("on", "off"):
        if name in fields:
            fields[name] = tuple(row for text in fields[name] for row in text.split(",") if row)
    for line in dict.fromkeys(getattr(names, "no_effect", [])):
        print(line, file=sys.stderr)
    auto: dict[str, Any] = {name: None for name, value in fields.items() if value == "auto" and _is_integer(name)}
    config = Config(**{**fields, **auto})
    if names.print_config:
        print(_as_toml(config), end="")
        raise SystemExit(0)
    return config, names


def _is_integer(name: str) -> bool:
    return optional_of(field_types()[name])[0] is int


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help=knobs()["model"].help)
    parser.add_argument("--config", metavar="FILE", help="YAML, TOML or JSON file whose keys are long flags")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as TOML and exit")
    groups = {name: parser.add_argument_group(f"{name}: {text}") for name, text in GROUPS.items()}
    for name in knobs():
        _add_flag(groups[knobs()[name].group], name)
    for other, (count, why) in NO_EFFECT.items():
        parser.add_argument(
            other, nargs=count if count != 1 else None, action=_NoEffect, const=why, help=argparse.SUPPRESS
        )
    parser.add_argument(flag(compilation.FIELD), action=_Compilation, help=argparse.SUPPRESS)
    for other, (count, harmless, why) in REFUSED.items():
        parser.add_argument(
            other, nargs=count if count != 1 else None, action=_Refused, const=(harmless, why), help=argparse.SUPPRESS
        )


def _add_flag(group: Any, name: str) -> None:
    knob = knobs()[name]
    kind, _ = optional_of(field_types()[name])
    default = dataclasses.asdict(Config())[name]
    text = knob.help.replace("%", "%%")
    spelled = [flag(name), *(other for other in knob.flags if not other.startswith("--"))]
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        group.add_argument(*spelled, action=argparse.BooleanOptionalAction, **options)
        return
    if default not in (None, "", (), {}):
        options["help"] += f" (default: {default})"
    if get_origin(kind) is dict:
        options |= {"action": _Merge, "metavar": "JSON"}
    elif get_origin(kind) is tuple:
        options |= {"nargs": "+", "metavar": "NAME", "action": "extend" if name in ("on", "off") else "store"}
        if get_args(kind)[0] is int:
            options |= {"type": _integer, "metavar": "N"}
    elif knob.choices:
        options |= {"metavar": "{" + ",".join(knob.choices) + "}"}
    else:
        options |= {"type": _integer if kind is int else kind, "metavar": "N" if kind is int else "X"}
    group.add_argument(*spelled, **options)


def _spell(argv: list[str], known: set[str]) -> list[str]:
    """The command line in our spelling. AskError for a flag that nobody knows."""
    alike = {**SAME, **{other: flag(name) for name, knob in knobs().items() for other in knob.flags}}
    alike |= _switches()
    spelled: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--":
            spelled += [token, *tokens]
            break
        if not token.startswith("-") or token == "-" or re.fullmatch(r"-\d[\d.]*\w?", token):
            spelled.append(token)
            continue
        if found := re.fullmatch(r"-O\.?(\d)", token):
            token = f"--optimization-level={found.group(1)}"
        name, equals, value = token.partition("=")
        name, _, key = name.partition(".")
        name = name if not name.startswith("--") else name.replace("_", "-")
        name, _, fixed = alike.get(name, name).partition("=")
        name, _, inner = name.partition(".")
        key = key or inner
        if name not in known:
            raise AskError("is not a flag", field=token.partition("=")[0], hint=suggestion(name, known))
        if fixed:
            if equals:
                raise AskError("takes no value", field=token.partition("=")[0], hint=f"{name}={value}")
            spelled.append(f"{name}={fixed}")
        elif key:
            value = value if equals else next(tokens, "")
            spelled.append(f"{name}={json.dumps({key: value})}")
        else:
            spelled.append(name + equals + value)
    return spelled


def _switches() -> dict[str, str]:
    """--enable-x, --disable-x, --x, --no-x and --no-enable-x of every boolean field, as the one that argparse knows."""
    spelled: dict[str, str] = {}
    for name, kind in field_types().items():
        if optional_of(kind)[0] is not bool:
            continue
        own = flag(name)
        stem = re.sub("^--(enable|disable)-", "", own).removeprefix("--")
        yes, no = own, f"--no-{own[2:]}"
        if own.startswith("--disable-"):
            yes, no = no, yes
        spelled |= {f"--{stem}": yes, f"--enable-{stem}": yes, f"--disable-{stem}": no, f"--no-{stem}": no}
        spelled |= {f"--no-enable-{stem}": no, f"--no-disable-{stem}": yes}
    return spelled


def _integer(text: str) -> int | str:
    """8192, 8k (8,000), 8K or 8KiB (8,192), auto."""
    if text == "auto":
        return text
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kKmMgG]|[KMG]iB)?", text)
    number = float(found.group(1)) * UNITS.get(found.group(2) or "", 1) if found else 0.5
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no integer, such as 8192, 8k (8,000) or 8K (8,192)")
    return int(number)


class _Merge(argparse.Action):
    """Merges JSON objects; {"op": "kernel"} and op=kernel both work."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            found = json.loads(values) if values.lstrip().startswith("{") else dict([values.split("=", 1)])
        except (json.JSONDecodeError, ValueError):
            raise AskError(f"{values!r} is no JSON object", field=str(option_string)) from None
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **found})


class _Compilation(argparse.Action):
    """vLLM's compilation config: what it says of CUDA graphs, as the flags for that."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        fields, lines = compilation.read(values)
        for name, value in fields.items():
            setattr(namespace, name, value)
        namespace.no_effect = [*getattr(namespace, "no_effect", []), *lines]


class _NoEffect(argparse.Action):
    """Notes a flag that changes nothing here."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        line = f"accepted, no effect: {option_string} ({self.const})"
        namespace.no_effect = [*getattr(namespace, "no_effect", []), line]


class _Refused(argparse.Action):
    """Refuses a flag, unless its value asks for nothing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        harmless, why = self.const
        if values not in harmless:
            raise AskError(why, field=str(option_string))


def _read_config_file(path: Path) -> list[str]:
    """A file's keys as a command line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AskError(f"{path} cannot be read: {error}", field="--config") from None
    argv: list[str] = []
    for key, value in _load(path, text).items():
        name = "--" + str(key)
        if isinstance(value, bool):
            argv.append(name if value else "--no-" + str(key))
        elif isinstance(value, list):
            argv += [name, *map(str, value)] if value else []
        elif isinstance(value, dict):
            argv += [f"{name}={json.dumps(value)}"] if value else []
        elif value is not None:
            argv.append(f"{name}={value}")
    return argv


def _load(path: Path, text: str) -> dict[str, Any]:
    read = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix, _load_yaml)
    try:
        found = read(text)
    except ValueError as error:
        raise AskError(f"{path}: {error}", field="--config") from None
    if not isinstance(found, dict):
        raise AskError(f"{path} holds no flags by name", field="--config")
    return found


def _load_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise AskError("YAML needs the package pyyaml", field="--config", hint="pip install pyyaml, or TOML") from None
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        return found
    return {
        {True: "on", False: "off"}.get(key, key): value for key, value in found.items()
    }  # YAML 1.1 reads on as true


def _as_toml(config: Config) -> str:
    """What differs from the defaults as lines that --config reads again."""
    lines = []
    for name, value in config.changed().items():
        if isinstance(value, dict):
            pairs = ", ".join(f"{json.dumps(key)} = {json.dumps(text)}" for key, text in value.items())
            lines.append(f"{flag(name)[2:]} = {{ {pairs} }}")
        else:
            lines.append(f"{flag(name)[2:]} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join(lines) + "\n"
