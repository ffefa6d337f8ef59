"""Read sizes off the inputs, where they have them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import info, value
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class SizesFromInputs(Pass):
    """Let `sym_size(value)` read an input that has the same size.

    Tracing names a size after the first value that it meets. Where that is an activation of a late block, every
    early block that needs the size (to divide by it, to broadcast) would wait for the late one.
    """

    name = "sizes_from_inputs"
    level = "aten"
    preserves_numerics = True
    summary = "read sizes off the inputs instead of activations"

    def run(self, graph: JointGraph) -> PassResult:
        """One size node per symbol, on the first input that has it."""
        known: dict[str, tuple[fx.Node, int]] = {}
        for node in graph.nodes:
            if node.op != "placeholder" or not isinstance(value(node), torch.Tensor):
                continue
            for dim, size in enumerate(value(node).shape):
                if isinstance(size, torch.SymInt):
                    known.setdefault(str(size), (node, dim))
        made: dict[str, fx.Node] = {}
        modified = False
        for node in list(graph.nodes):
            if node.target is not torch.ops.aten.sym_size.int or node.args[0] in graph.inputs.values():
                continue
            symbol = str(value(node))
            if symbol not in known:
                continue
            if symbol not in made:
                made[symbol] = graph.emit(torch.ops.aten.sym_size.int, known[symbol], like=info(node))
            graph.substitute(node, made[symbol])
            modified = True
        graph.sort()
        return PassResult(graph, modified)
