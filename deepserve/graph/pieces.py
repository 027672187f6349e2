"""A decoder's graph in pieces: cut at the ops that look at the batch itself (attention), which are pieces of their own.

What lies between them reads nothing but rows, one a token: it computes the same for any batch with so many tokens.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from deepserve.graph.bind import BoundGraph, bind
from deepserve.ops.load import load_op
from deepserve.ops.op import Kernel, Op

ROWS = ("token_ids", "positions", "slot_mapping")  # of a batch: what a piece may read


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of ops, forward(batch, *inputs) -> a tuple of outputs; or (`attends`) one op that looks at the batch
    itself, forward(batch, *inputs) -> its result.

    `inputs` and `outputs` name values, each made by one piece; all of them have a row a token.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attends: bool


@dataclass(frozen=True, slots=True)
class BoundPiece:
    """A Piece with its kernels. With `takes_out` it has one more argument: where to write its result, or None."""

    function: BoundGraph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attends: bool
    takes_out: bool


def beside_attention(fusions: Collection[str]) -> set[str]:
    """Those of the fused ops that do not look at the batch: of an op that attends, as little as can be is to be one, as
    it is not recorded."""
    return {name for name in fusions if "batch" not in load_op(name).parameters}


def bind_pieces(
    graph: fx.GraphModule, kernels: Mapping[str, Kernel], packed_before: dict[Any, Any] | None = None
) -> list[BoundPiece]:
    """The pieces of a graph, bound as graph/bind.py does it."""
    bound = []
    for piece in split(graph):
        takes_out = piece.attends and _give_out(piece.graph, kernels)
        function = bind(piece.graph, kernels, packed_before)
        bound.append(BoundPiece(function, piece.inputs, piece.outputs, piece.attends, takes_out))
    return bound


def split(graph: fx.GraphModule) -> list[Piece]:
    """The pieces in the order in which they run. ValueError where one reads of the batch what is not in ROWS."""
    cut = _Cut(graph)
    return [cut.piece(run) for run in cut.runs]


def _give_out(graph: fx.GraphModule, kernels: Mapping[str, Kernel]) -> bool:
    """Lets the graph's op write its result to a last argument, if its kernel can."""
    node = next(node for node in graph.graph.nodes if isinstance(node.target, Op))
    if "out" not in inspect.signature(kernels[node.target.name].function).parameters:
        return False
    *_, last = (one for one in graph.graph.nodes if one.op == "placeholder")
    with graph.graph.inserting_after(last):
        out = graph.graph.placeholder("out")
    node.args = (*node.args, out)
    return True


class _Cut:
    """A graph's nodes in runs: those that are computed, each in one run.

    Constants and what is read of the batch are in none of them, but made wherever they are needed. A part of a tuple is
    taken in the run that makes the tuple. A cache that was written is the constant that it was before.
    """

    def __init__(self, graph: fx.GraphModule):
        self._model = graph.meta["model"]
        self._nodes = list(graph.graph.nodes)
        (self._batch,) = (node for node in self._nodes if node.op == "placeholder")
        self._free: set[fx.Node] = set()
        self._run_of: dict[fx.Node, list[fx.Node]] = {}
        self.runs: list[list[fx.Node]] = []
        for node in self._nodes:
            if node.op == "output" or node is self._batch:
                continue
            if node.op == "get_attr" or (node.target in (getattr, operator.getitem) and self._is_free(node)):
                self._free.add(node)
            else:
                self._place(node)

    def piece(self, run: list[fx.Node]) -> Piece:
        """One run as a graph of its own."""
        made, own, attends = fx.Graph(), set(run), self._attends(run[0])
        copies = {self._batch: made.placeholder("batch")}
        outside = (one for node in run for one in node.all_input_nodes if one not in own)
        needed = dict.fromkeys(map(self._cache_of, outside))
        inputs = [node for node in needed if node not in self._free and node is not self._batch]
        copies |= {node: made.placeholder(node.name) for node in inputs}

        def copy(node: fx.Node) -> fx.Node:
            node = node if node in own else self._cache_of(node)
            if node not in copies:
                self._check(node, attends)
                copies[node] = made.node_copy(node, copy)
            return copies[node]

        for node in run:
            copy(node)
        outputs = [node for node in run if self._cache_of(node) is node and any(user not in own for user in node.users)]
        made.output(copies[outputs[0]] if attends else tuple(copies[node] for node in outputs))
        module = fx.GraphModule(self._model, made)
        module.meta["model"] = self._model
        return Piece(module, tuple(node.name for node in inputs), tuple(node.name for node in outputs), attends)

    def _place(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        if node.target is operator.getitem and len(sources) == 1 and not self._attends(sources[0]):
            run = self._run_of[sources[0]]
        elif not self.runs or self._attends(node) or self._attends(self.runs[-1][0]):
            run = []
            self.runs.append(run)
        else:
            run = self.runs[-1]
        run.append(node)
        self._run_of[node] = run

    def _attends(self, node: fx.Node) -> bool:
        return self._batch in node.all_input_nodes and node.target is not getattr

    def _is_free(self, node: fx.Node) -> bool:
        return all(source is self._batch or source in self._free for source in node.all_input_nodes)

    def _check(self, node: fx.Node, attends: bool) -> None:
        if not attends and node.target is getattr and node.args[1] not in ROWS:
            raise ValueError(f"between two attentions batch.{node.args[1]} is read, which is none of {', '.join(ROWS)}")

    def _cache_of(self, node: fx.Node) -> fx.Node:
        """The cache that an op returns once it has written to it; any other node as it is."""
        op = node.target
        if not isinstance(op, Op) or len(op.writes) != 1 or self._attends(node):
            return node
        source = node.args[op.parameters.index(op.writes[0])]
        return self._cache_of(source) if isinstance(source, fx.Node) else node
