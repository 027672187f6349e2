"""Size budgets: what one person can read."""

import ast

from tests.house.size import BUDGET, product_files
from tests.house.tree import Module, functions, modules

FILE_LINES, KERNEL_FILE_LINES = 400, 600
FUNCTION_LINES, TRITON_LINES = 60, 150
PARAMETERS = 8


def _is_kernel_file(module: Module) -> bool:
    return module.is_ops and module.name.count(".") >= 2 and module.path.stem not in ("spec", "__init__")


def _is_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator).split("(")[0].split(".") for decorator in function.decorator_list)


def _over_budget(module: Module) -> list[str]:
    found = []
    lines, limit = len(module.text.splitlines()), KERNEL_FILE_LINES if _is_kernel_file(module) else FILE_LINES
    if lines > limit:
        found.append(f"{module.where}: {lines} lines, at most {limit}")
    for function in functions(module):
        where = f"{module.where}:{function.lineno} {function.name}"
        lines = function.end_lineno - function.lineno + 1
        limit = TRITON_LINES if _is_triton(function) else FUNCTION_LINES
        if lines > limit:
            found.append(f"{where}: {lines} lines, at most {limit}")
        names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > PARAMETERS and not module.is_ops:
            found.append(f"{where}: {count} parameters, at most {PARAMETERS}")
    return found


def test_files_and_functions() -> None:
    found = [line for module in modules().values() for line in _over_budget(module)]
    assert not found, "\n".join(found)


def test_the_whole_product() -> None:
    lines = sum(product_files().values())
    assert lines <= BUDGET, f"{lines} lines under deepserve/, at most {BUDGET}: `make size` says where"


def test_the_budgets_bite() -> None:
    body = "    x = 1\n" * 70
    text = f"def f(a, b, c, d, e, f, g, h, i):\n{body}\n@triton.jit\ndef _k():\n{body}" + "\n" * 300
    module = Module("layers.x", modules()[""].path, text, ast.parse(text))
    assert len(_over_budget(module)) == 3
    assert len(_over_budget(Module("ops.x.triton", modules()[""].path.parent / "triton.py", text, module.ast))) == 1
