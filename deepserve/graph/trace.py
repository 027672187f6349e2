"""Records a model's forward as an FX graph whose nodes are ops: milliseconds a layer, meta tensors will do."""

from __future__ import annotations

import operator

import torch
from torch import fx

from deepserve.ops.op import Op


class _Tracer(fx.Tracer):
    """Sees through every module: only ops and tensor methods become nodes."""

    def __init__(self, method: str):
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False


def trace(model: torch.nn.Module, method: str = "forward") -> fx.GraphModule:
    """The graph of `model.method(...)`, all layers in one, each value computed once.

    Parameters, buffers and tensor attributes (the caches: they must be tensors by now, empty ones will do) become
    get_attr nodes that graph/bind.py looks up on `graph.meta["model"]`.
    """
    graph = _Tracer(method).trace(model)
    _merge(graph)
    module = fx.GraphModule(model, graph)
    module.meta["model"] = model
    return module


def _merge(graph: fx.Graph) -> None:
    """Lets equal nodes be one: a batch attribute that every layer reads, a quantisation that two linears need."""
    seen: dict[tuple[object, str], fx.Node] = {}
    for node in list(graph.nodes):
        pure = node.target in (getattr, operator.getitem) or (isinstance(node.target, Op) and not node.target.writes)
        if node.op != "get_attr" and not (node.op == "call_function" and pure):
            continue
        first = seen.setdefault((node.target, repr(node.args)), node)  # nodes print as their names, which are unique
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
