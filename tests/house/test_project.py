"""The project's own files: reasons for dependencies, frozen knobs, one public door."""

import dataclasses
import importlib
import re
import sys
import tomllib

import pytest

import deepserve
from tests.house.size import ROOT
from tests.house.tree import imports, modules

FIELDS = ROOT / "tests/house/config_fields.txt"


def test_every_dependency_is_a_range_with_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in wanted:
        assert re.search(r"[<>]", requirement), f"{requirement}: no range"
        assert "==" not in requirement, f"{requirement}: a pin"
        line = next(line for line in text.splitlines() if line.strip().startswith(f'"{requirement}"'))
        assert re.search(r",\s+# \S+ \S+", line), f"{requirement}: no reason on its line"


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["server"], *extras["bench"]]
    declared = {re.split(r"[<>=\[]", one)[0].replace("-", "_") for one in wanted}
    declared = {{"pyzmq": "zmq", "pyyaml": "yaml"}.get(name, name) for name in declared}
    used = {name.split(".")[0] for module in modules().values() for name, _ in imports(module)}
    used -= {*sys.stdlib_module_names, "deepserve", "triton"}  # every GPU build of torch brings its own Triton
    by_name = {"uvloop", "httptools"}  # uvicorn imports these when it is told to
    assert used <= declared, f"imported, not declared: {used - declared}"
    assert declared - by_name <= used, f"declared, not imported: {declared - by_name - used}"


def test_the_version_is_said_once_more_only_in_the_package() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == deepserve.__version__


def test_the_door_has_three_names() -> None:
    assert sorted(deepserve.__all__) == ["Config", "LLM", "SamplingParams"]
    with pytest.raises(AttributeError, match="no public name 'Engine'"):
        deepserve.Engine  # noqa: B018 (looked up for its error)


@pytest.mark.skipif("config" not in modules(), reason="there is no deepserve/config.py yet")
def test_the_knobs_are_frozen() -> None:
    """A knob is a debt. Whoever adds, renames or removes one changes config_fields.txt with it, on purpose."""
    config = importlib.import_module("deepserve.config")
    classes = [
        value
        for _, value in sorted(vars(config).items())
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == config.__name__
    ]
    knobs = [f"{cls.__name__}.{field.name}" for cls in classes for field in dataclasses.fields(cls)]
    assert "Config" in {knob.split(".")[0] for knob in knobs}, "config.py has no dataclass Config"
    frozen = FIELDS.read_text().split() if FIELDS.exists() else []
    added, removed = sorted(set(knobs) - set(frozen)), sorted(set(frozen) - set(knobs))
    assert not added, f"add to {FIELDS.name}: {' '.join(added)}"
    assert not removed, f"remove from {FIELDS.name}: {' '.join(removed)}"


def test_ci_runs_what_a_contributor_runs() -> None:
    steps = (ROOT / ".ci/run").read_text()
    assert "make lint" in steps
    assert "make test" in steps
