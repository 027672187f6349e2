"""The package as the house tests see it: every module parsed once, nothing imported."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.house.size import ROOT

PACKAGE = ROOT / "deepserve"


@dataclass(frozen=True)
class Module:
    """One file of the package. `name` is dotted from the package on: `scheduler.budget`, `ops` for ops/__init__.py."""

    name: str
    path: Path
    text: str
    ast: ast.Module

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def is_ops(self) -> bool:
        return self.name.split(".")[0] == "ops"


@functools.cache
def modules() -> dict[str, Module]:
    """All modules by name, tests beside the ops left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name.startswith("test_"):
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        found[name] = Module(name, path, text, ast.parse(text, str(path)))
    return found


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones too."""
    for node in ast.walk(module.ast):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@functools.cache
def imports(module: Module, typing_only: bool = True) -> tuple[tuple[str, int], ...]:
    """Dotted names that a module imports anywhere, inside functions too, with the line.

    `from deepserve.ops import x` gives `deepserve.ops.x` where that is a module, else `deepserve.ops`.
    typing_only=False leaves out what stands under `if TYPE_CHECKING`.
    """
    found: list[tuple[str, int]] = []
    skipped = set() if typing_only else _under_type_checking(module.ast)
    for node in ast.walk(module.ast):
        if isinstance(node, ast.Import) and node not in skipped:
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node not in skipped:
            source = _absolute(module, node)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.append((full if full.removeprefix("deepserve.") in modules() else source, node.lineno))
    return tuple(found)


def imported_modules(module: Module, typing_only: bool = True) -> Iterator[tuple[str, int]]:
    """The names of the package's own modules that a module imports, with the line. The door (__init__) is left out."""
    for name, line in imports(module, typing_only):
        own = name.removeprefix("deepserve.")
        if own != name and own in modules():
            yield own, line


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = ["deepserve", *module.name.split(".")]
    if module.path.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def _under_type_checking(tree: ast.Module) -> set[ast.AST]:
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}
