"""Names and habits: what files may be called, what must be documented, what may not stand in the code."""

import ast
import re

from tests.house.size import ROOT
from tests.house.tree import Module, modules

FORBIDDEN_FILES = {"utils", "util", "common", "base", "misc", "helpers", "helper"}
ENVIRONMENT = re.compile(r"os\.environ|getenv|\bputenv\b|from os import .*\benviron\b")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
BANNER = re.compile(r"#\s*[-=#*~_─═]{4,}")
WORKPLACE = re.compile(r"/work/(main|shared|notes)|/tmp/\w+/")


def test_habits() -> None:
    found = [line for module in modules().values() for line in _habits(module)]
    assert not found, "\n".join(found)


def test_public_names_are_documented() -> None:
    found = [line for module in modules().values() for line in _undocumented(module)]
    assert not found, "\n".join(found)


def test_tests_and_benchmarks_are_finished_too() -> None:
    found = []
    for path in (*sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))):
        if path.parent.name != "house":
            where = path.relative_to(ROOT)
            lines = enumerate(path.read_text().splitlines(), 1)
            found += [
                f"{where}:{n}: {line.strip()}" for n, line in lines if UNFINISHED.search(line) or BANNER.search(line)
            ]
    assert not found, "\n".join(found)


def _habits(module: Module) -> list[str]:
    found = []
    for part in module.path.relative_to(ROOT).with_suffix("").parts:
        if part in FORBIDDEN_FILES or part.rsplit("_", 1)[-1] in ("utils", "helpers"):
            found.append(f"{module.where}: {part} says nothing; name the noun")
    rules = (
        (ENVIRONMENT, "reads the environment: make it a Config field"),
        (UNFINISHED, "is unfinished: do it, or say so in the documentation"),
        (BANNER, "is a banner: a file that needs one is two files"),
        (WORKPLACE, "names a path of one machine"),
    )
    for number, line in enumerate(module.text.splitlines(), 1):
        found += [f"{module.where}:{number} {why}" for pattern, why in rules if pattern.search(line)]
    return found


def _undocumented(module: Module) -> list[str]:
    """Public functions and classes at the top of a module, and modules that hold any code, without a docstring."""
    found = []
    if module.ast.body and ast.get_docstring(module.ast) is None:
        found.append(f"{module.where}: the module has no docstring")
    for node in module.ast.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            found.append(f"{module.where}:{node.lineno} {node.name} has no docstring")
    return found


def test_the_rules_bite() -> None:
    text = "import os\nX = os.environ['A']  # TODO\n# ------- part -------\ndef f():\n    pass\n"
    module = Module("common", ROOT / "deepserve/common.py", text, ast.parse(text))
    assert len(_habits(module)) == 4
    assert len(_undocumented(module)) == 2
