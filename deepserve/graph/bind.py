"""Turns a graph of ops into one plain function: straight-line Python that calls the chosen kernels."""

from __future__ import annotations

import copy
import linecache
import operator
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
    for node in list(line.nodes):
        if isinstance(node.target, Op):
            _use(line, node, node.target, kernels)
    constants = _constants(line, graph.meta["model"])
    for idx, node in enumerate(constants):
        node.target = f"w{idx}"
    return _compile(line, {str(node.target): value for node, value in constants.items()})


def _use(line: fx.Graph, node: fx.Node, op: Op, kernels: Mapping[str, Kernel]) -> None:
    """Makes a node that calls an op call its kernel."""
    kernel = kernels.get(op.name)
    if kernel is None:
        raise KeyError(f"the graph calls {op.name}, and no kernel is given for it")
    if kernel.pack is not None:
        _pack(line, node, op, kernel.pack)
    node.target = kernel.function


def _constants(line: fx.Graph, model: torch.nn.Module) -> dict[fx.Node, Any]:
    """Each get_attr node with its value. Slices of weights become such nodes too: views made once, not at each call."""
    constants: dict[fx.Node, Any] = {}
    packed: dict[tuple[str, Any], Any] = {}
    for node in list(line.nodes):
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(model)
            value = value.detach() if isinstance(value, torch.Tensor) else value
            if pack := node.meta.get("pack"):
                key = (str(node.target), pack)
                value = packed[key] if key in packed else packed.setdefault(key, pack(value))
            constants[node] = value
        elif node.target is operator.getitem and node.args[0] in constants and _is_basic(node.args[1]):
            constants[node] = constants[node.args[0]][node.args[1]]
            node.op, node.args = "get_attr", ()
    for node in reversed(list(constants)):
        if not node.users:
            line.erase_node(node)
            del constants[node]
    return constants


def _is_basic(index: Any) -> bool:
    """Whether an index of numbers and slices makes a view."""
    if isinstance(index, slice):
        return not any(isinstance(part, fx.Node) for part in (index.start, index.stop, index.step))
    if isinstance(index, tuple):
        return all(map(_is_basic, index))
    return index is None or index is Ellipsis or isinstance(index, int)


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
