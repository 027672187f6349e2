"""Turns a graph of ops into one plain function: straight-line Python that calls the chosen kernels."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import fx

from deepserve.ops.op import Kernel, Op


class BoundGraph:
    """Calls the bound function; `source` is its text, which a debugger steps through."""

    __slots__ = ("_function", "source")

    def __init__(self, function: Callable[..., Any], source: str):
        self._function = function
        self.source = source

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def bind(graph: fx.GraphModule, kernels: Mapping[str, Kernel]) -> BoundGraph:
    """The graph with each op replaced by its kernel's function; `kernels` names one for every op in it.

    Call it once weights are loaded and caches allocated: tensors are looked up here, not at each call. A kernel's
    `pack` rewrites the op's `weight` here, once; the model keeps the unpacked one for its eager methods.
    """
    line = copy.deepcopy(graph.graph)
    tensors: dict[str, Any] = {}
    names: dict[tuple[str, Any], str] = {}
    for node in list(line.nodes):
        if isinstance(node.target, Op):
            kernel = kernels.get(node.target.name)
            if kernel is None:
                raise KeyError(f"the graph calls {node.target.name}, and no kernel is given for it")
            if kernel.pack is not None:
                _pack(line, node, node.target, kernel.pack)
            node.target = kernel.function
    for node in line.nodes:
        if node.op == "get_attr":
            pack = node.meta.get("pack")
            name = names.setdefault((node.target, pack), f"w{len(names)}")
            if name not in tensors:
                value = attrgetter(node.target)(graph.meta["model"])
                value = value.detach() if isinstance(value, torch.Tensor) else value
                tensors[name] = pack(value) if pack else value
            node.target = name
    return _compile(line, tensors)


def _pack(line: fx.Graph, node: fx.Node, op: Op, pack: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Gives the node a get_attr of its own for its weight, marked to be packed (others may want it as it was)."""
    position = op.parameters.index("weight")
    weight = node.args[position]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        raise ValueError(f"{op.name}: a packed weight must be a parameter of the model, not {weight}")
    with line.inserting_before(node):
        packed = line.get_attr(str(weight.target))
    packed.meta["pack"] = pack
    node.update_arg(position, packed)
    if not weight.users:
        line.erase_node(weight)


def _compile(line: fx.Graph, tensors: dict[str, Any]) -> BoundGraph:
    code = line.python_code("self")
    file = f"<bound graph {id(line):x}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    scope = dict(code.globals)
    exec(compile(code.src, file, "exec"), scope)
    return BoundGraph(MethodType(scope["forward"], SimpleNamespace(**tensors)), code.src)
