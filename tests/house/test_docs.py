"""Documentation is checked like code: make targets, file:function names and relative links exist."""

import ast
import re

import pytest

from tests.house.size import ROOT
from tests.house.tree import modules

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)\s#]+)")
PLACE = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?(?:\(\))?`")


def _names(tree: ast.Module) -> set[str]:
    """What a module defines at its top, and `Class.method` for each class."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _place_problem(path: str, name: str | None) -> str | None:
    """Why `path:name` does not exist, from the package, the root or anywhere unique; None if it does."""
    by_path = {str(module.path.relative_to(ROOT)): module for module in modules().values()}
    fits = [module for where, module in by_path.items() if where == path or where.endswith("/" + path)]
    if not fits and (ROOT / path).is_file():
        return None
    if not fits:
        return f"{path} does not exist"
    if name and not any(name in _names(module.ast) for module in fits):
        return f"{path} defines no {name}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page) -> None:
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken, f"{page.name}: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_places_in_the_code_exist(page) -> None:
    problems = [problem for place in PLACE.findall(page.read_text()) if (problem := _place_problem(*place))]
    assert not problems, f"{page.name}: {problems}"


@pytest.mark.skipif(not (ROOT / "ARCHITECTURE.md").exists(), reason="there is no ARCHITECTURE.md yet")
def test_the_life_of_a_request_names_functions() -> None:
    named = [name for _, name in PLACE.findall((ROOT / "ARCHITECTURE.md").read_text()) if name]
    assert len(named) >= 12, f"12 steps, each with its `file.py:function`; found {named}"


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            used = set(re.findall(r"^(?:\$ )?make ([a-z-]+)", block, re.M))
            assert used <= targets, f"{page.name}: no target {used - targets}"


def test_the_checks_bite() -> None:
    assert _place_problem("log.py", "setup") is None
    assert "defines no" in _place_problem("log.py", "no_such_name")
    assert "does not exist" in _place_problem("no_such_file.py", None)
