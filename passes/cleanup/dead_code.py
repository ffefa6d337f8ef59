"""Remove operators whose results nothing reads."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.graph.joint import JointGraph
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
        return PassResult(graph, graph.prune() > 0)
