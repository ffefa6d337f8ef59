"""Run the backward in two stages: input cotangents at once, weight gradients later."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.graph.joint import JointGraph
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class SplitBackward(Pass):
    """Move weight gradients (`w_*`) into a stage of their own, behind the one that computes input cotangents (`d_*`).

    The gradients are the same numbers. A pipeline stage can hand its input's cotangent on before it computes its weight
    gradients, and fill what would be idle time with them; between the stages it holds, for each linear map, the input
    and the cotangent of the output.

    What cannot wait (normalisations compute both in one kernel) stays in the first stage, with the reason in the
    report.
    """

    name = "split_backward"
    level = "aten"
    preserves_numerics = True
    summary = "compute input cotangents at once and weight gradients in a later stage"
    paper = (
        "Rae, Lee, Richings 2024, https://arxiv.org/abs/2405.18047; Qi et al. 2023, https://arxiv.org/abs/2401.10241"
    )

    def run(self, graph: JointGraph) -> PassResult:
        """Mark the nodes of the weight stage."""
        split = graph.split_backward()
        for of, reason in split.kept.items():
            self.fail(graph, f"the gradient of {of} stays in the first stage: {reason}", graph.grads()[of])
        if not split.nodes and not split.kept:
            self.fail(graph, "the graph computes no gradient")
        return PassResult(graph, bool(split.nodes))
