"""Derived fusions: a fused op's reference is written with other ops, so its trace is the pattern that it replaces."""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch import fx
from torch.fx import subgraph_rewriter

from deepserve.ops.inventory import inventory
from deepserve.ops.load import load_op
from deepserve.ops.op import Op, inlining


def fused_ops() -> dict[str, Op]:
    """Every op that graph rewriting can introduce, by name."""
    ops = {name: load_op(name) for name in inventory()}
    return {name: op for name, op in ops.items() if op.fused}


def rewrite(graph: fx.GraphModule, enabled: Collection[str]) -> dict[str, int]:
    """Puts the enabled fused ops into the graph, the widest pattern first; returns how often each fired."""
    known = fused_ops()
    if unknown := sorted(set(enabled) - set(known)):
        raise ValueError(f"no fused op is called {', '.join(unknown)}; there are {', '.join(known)}")
    patterns = {name: pattern(known[name]) for name in sorted(enabled)}
    fired = {}
    for name in sorted(patterns, key=lambda name: -len(patterns[name].graph.nodes)):
        outputs = patterns[name].graph.output_node().args[0]
        replacement = _replacement(known[name], len(outputs) if isinstance(outputs, tuple) else None)
        fired[name] = len(subgraph_rewriter.replace_pattern_with_filters(graph, patterns[name], replacement))
    return fired


def pattern(op: Op) -> fx.GraphModule:
    """A fused op as the graph of unfused ops that it stands for."""
    with inlining():
        return fx.symbolic_trace(op.reference)


def _replacement(op: Op, num_outputs: int | None) -> fx.GraphModule:
    """A graph of the op alone, its result taken apart where the pattern has several outputs."""
    graph = fx.Graph()
    result = graph.call_function(op, tuple(graph.placeholder(name) for name in op.parameters))
    if num_outputs is None:
        graph.output(result)
    else:
        graph.output(tuple(graph.call_function(operator.getitem, (result, i)) for i in range(num_outputs)))
    return fx.GraphModule({}, graph)
