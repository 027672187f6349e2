"""A graph in words: how many calls of each op, before and after rewriting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import fx

from deepserve.ops.op import Op


def count_ops(graph: fx.GraphModule) -> dict[str, int]:
    """Op name -> how often the graph calls it, the most frequent first."""
    return dict(Counter(node.target.name for node in graph.graph.nodes if isinstance(node.target, Op)).most_common())


def show(before: Mapping[str, int], after: Mapping[str, int], fired: Mapping[str, int]) -> str:
    """The table of `deepserve plan --graph`: calls of each op as written and as run, and what each fusion did."""
    names = sorted(before.keys() | after.keys(), key=lambda name: (-max(before.get(name, 0), after.get(name, 0)), name))
    width = max(map(len, [*names, *fired, "calls"]), default=5)
    lines = [f"{'op':{width}}  as written  as run"]
    lines += [f"{name:{width}}  {before.get(name, 0):10}  {after.get(name, 0):6}" for name in names]
    lines += [f"{'calls':{width}}  {sum(before.values()):10}  {sum(after.values()):6}"]
    lines += [f"{name} fired {count} times" for name, count in fired.items()]
    return "\n".join(lines)
