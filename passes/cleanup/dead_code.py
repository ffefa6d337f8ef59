"""Remove operators whose results nothing reads."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.ops import is_random
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove operators that no output depends on.

    Random operators of the forward stay even when unread: removing one would shift the random numbers of all
    later ones away from eager's.
    """

    name = "eliminate_dead_code"
    level = "aten"
    preserves_numerics = True
    summary = "remove operators whose results nothing reads"

    def run(self, graph: JointGraph) -> PassResult:
        """Remove, from the last node to the first."""
        removed = graph.prune()
        for node in graph.nodes:
            if node.op == "call_function" and not node.users and is_random(node):
                self.fail(graph, "random: without it, later random numbers would be others than in eager mode", node)
        return PassResult(graph, removed > 0)
