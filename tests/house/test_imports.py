"""One river, one direction: who may import whom, what imports no torch, and which package may be used where."""

import ast
import subprocess
import sys

import pytest

from tests.house.size import ROOT
from tests.house.tree import Module, imported_modules, imports, modules

# Upper rows may import lower rows and their own row, never back. The longest name that fits is a module's room.
RIVER = (
    "cli",
    "server bench tune",
    "llm",
    "chat",
    "engine tokenizer",
    "build",
    "engine.engine engine.executor engine.admission engine.compiling recording",
    "runner scheduler kv_transfer spec_decode eplb sampling",
    "models kv_cache graph",
    "layers",
    "ops",
    "spellings config facts plan optimizations conditions ops.inventory hardware architecture kv_cache.spec "
    "runner.batch parallel",
    "messages request sampling_params structured_outputs outputs progress metrics dtypes transfer errors json_file log "
    "demo speculation sparse_attention compilation",
)

# Decides in plain Python: no torch, not even inside a function.
TORCH_FREE = (
    "config spellings facts architecture sparse_attention plan optimizations conditions ops.inventory messages request "
    "sampling_params outputs metrics errors json_file log scheduler kv_cache server.protocol speculation compilation "
    "structured_outputs sampling.grammar sampling.vocabulary chat ops.tiles tune.search tune.tables"
).split()
TORCH_ALLOWED = {"kv_cache.tensors"}
TORCH_LAZY = ["hardware", "cli"]  # import it inside functions, once there is reason to

# Third-party packages, and the only places that may import them. What the offline engine needs is free everywhere else.
OFFLINE = {"torch", "triton", "numpy", "safetensors", "tokenizers"}
ONLY_IN = {
    "jinja2": ("tokenizer",),
    "starlette": ("server",),
    "uvicorn": ("server",),
    "uvloop": ("server",),
    "prometheus_client": ("server",),
    "msgspec": ("server", "engine.transport", "engine.processes"),
    "zmq": ("server", "engine.transport", "engine.processes"),
    "aiohttp": ("bench.client", "bench.serve"),
    "yaml": ("cli.flags",),
    "llguidance": ("sampling.grammar",),
}


def _within(name: str, rooms: tuple[str, ...] | list[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _room(name: str) -> str:
    """The room of a module; its own name if the table has none, which a test of its own reports."""
    return max((room for row in RIVER for room in row.split() if _within(name, [room])), key=len, default=name)


def _row(name: str) -> int:
    return next((index for index, row in enumerate(RIVER) if _room(name) in row.split()), len(RIVER))


def test_every_module_has_a_room() -> None:
    homeless = [module.where for name, module in modules().items() if name and _row(name) == len(RIVER)]
    assert not homeless, f"not in the table of {__name__}: {homeless}"


def test_imports_go_one_way() -> None:
    wrong = []
    for name, module in modules().items():
        for target, line in imported_modules(module) if name else ():
            if _row(target) < _row(name):
                wrong.append(f"{module.where}:{line} imports {target}: {_room(name)} comes after {_room(target)}")
    assert not wrong, "\n".join(wrong)


def test_no_module_cycle() -> None:
    graph = {name: {target for target, _ in imported_modules(module, False)} for name, module in modules().items()}
    cycle = _cycle(graph)
    assert not cycle, " -> ".join(cycle)


def test_no_room_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for name, module in modules().items():
        for target, _ in imported_modules(module, False) if name else ():
            if _room(target) != _room(name):
                graph.setdefault(_room(name), set()).add(_room(target))
    cycle = _cycle(graph)
    assert not cycle, " -> ".join(cycle)


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of the graph as a path that ends where it began, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def _deciding() -> list[Module]:
    """The deciding half: the table above, and the __init__.py of every op's room, which says what kernels there are."""
    return [
        module
        for name, module in modules().items()
        if (_within(name, TORCH_FREE) and name not in TORCH_ALLOWED)
        or (module.is_ops and module.path.name == "__init__.py")
    ]


def test_the_deciding_half_names_no_torch() -> None:
    wrong = [
        f"{module.where}:{line}"
        for module in _deciding()
        for name, line in imports(module)
        if name.split(".")[0] in ("torch", "triton")
    ]
    assert not wrong, f"imports torch: {wrong}"


def _run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_deciding_half_imports_without_torch() -> None:
    names = {module.name for module in _deciding()} | {name for name in modules() if _within(name, TORCH_LAZY)}
    without = ("torch", "triton", "transformers", "starlette", "uvicorn", "zmq", "aiohttp")
    code = f"import sys, importlib\nfor n in {without}: sys.modules[n] = None\n"
    result = _run(code + f"for n in {sorted(names)}: importlib.import_module('deepserve.' + n)")
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif("cli.main" not in modules(), reason="there is no deepserve/cli/main.py yet")
def test_help_imports_neither_torch_nor_the_server() -> None:
    code = "import sys\nfor n in ('torch', 'triton', 'transformers', 'starlette', 'numpy'): sys.modules[n] = None\n"
    code += "sys.argv = ['deepserve', '--help']\nfrom deepserve.cli.main import main\nsys.exit(main())"
    result = _run(code)
    assert result.returncode == 0, result.stderr
    assert "serve" in result.stdout


@pytest.mark.skipif("llm" not in modules(), reason="there is no deepserve/llm.py yet")
def test_the_offline_door_opens_without_the_server_packages_and_without_triton() -> None:
    without = sorted({*ONLY_IN, "triton", "transformers"})
    result = _run(f"import sys\nfor n in {without}: sys.modules[n] = None\nfrom deepserve import LLM, SamplingParams")
    assert result.returncode == 0, result.stderr


def test_third_party_packages_stay_where_they_belong() -> None:
    wrong = []
    for name, module in modules().items():
        for target, line in imports(module):
            package = target.split(".")[0]
            if package in sys.stdlib_module_names or package in OFFLINE or package == "deepserve":
                continue
            vendor_room = module.is_ops and name.count(".") >= 2 and module.path.stem not in ("spec", "triton")
            if not vendor_room and not _within(name, ONLY_IN.get(package, ())):
                wrong.append(f"{module.where}:{line} imports {package}, allowed in: {ONLY_IN.get(package, 'nothing')}")
    assert not wrong, "\n".join(wrong)


def test_a_cycle_would_be_found() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_the_import_walk_sees_every_form() -> None:
    text = (
        "import torch.nn\nfrom deepserve.log import get_logger\nfrom . import log\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .sub import x\ndef f():\n    import zmq\n"
    )
    module = Module("sub.thing", ROOT / "deepserve/sub/thing.py", text, ast.parse(text))
    names = {name for name, _ in imports(module)}
    assert {"torch.nn", "deepserve.log", "deepserve.sub", "deepserve.sub.sub", "zmq"} <= names
    assert "deepserve.sub.sub" not in {name for name, _ in imports(module, typing_only=False)}
