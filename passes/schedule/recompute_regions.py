"""Recompute what a model wraps in `torch.utils.checkpoint`, or a rule wants to run again, instead of saving it."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import REPLAY, info, is_backward
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class RecomputeRegions(Pass):
    """Recompute in the backward what the user's model wraps in `torch.utils.checkpoint`, or a rule replays.

    Export inlines such regions; the gradients are the same, but everything inside would be saved. Rules with the option
    `replay` mark the forward of their blocks. Of a random operator
    its result stays saved (a dropout mask takes one byte per element), so the random numbers are the same.
    """

    name = "recompute_regions"
    level = "aten"
    preserves_numerics = True
    summary = "recompute what the model wraps in torch.utils.checkpoint"

    def run(self, graph: JointGraph) -> PassResult:
        """Repeat the operators of all regions that the backward reads."""
        inside = [n for n in graph.nodes if n.op == "call_function" and not is_backward(n) and info(n).region]
        ours = [n for n in inside if info(n).region == REPLAY]
        theirs = [n for n in inside if info(n).region != REPLAY]
        repeated = graph.recompute(theirs) if theirs else 0
        repeated += graph.recompute(ours, keep_blocks=True) if ours else 0
        if not inside:
            self.fail(graph, "the model wraps nothing in torch.utils.checkpoint")
        elif not repeated:
            self.fail(graph, "the backward reads nothing that a checkpointed region computes")
        return PassResult(graph, repeated > 0)
