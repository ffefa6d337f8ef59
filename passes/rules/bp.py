"""Backpropagation: the mirror itself."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.graph.joint import JointGraph
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class Backpropagation(Rule):
    """Leave the backward as differentiation made it: gradients are bitwise those of eager autograd.

    delta_l = (W_{l+1}^T delta_{l+1}) * phi'(z_l),  G_l = delta_l h_{l-1}^T.
    """

    name = "bp"
    preserves_numerics = True
    summary = "backpropagation, the exact gradient"
    formula = "δ_l = (W_{l+1}ᵀ δ_{l+1}) ⊙ φ'(z_l);  G_l = δ_l h_{l-1}ᵀ"
    paper = "Rumelhart, Hinton, Williams: Learning representations by back-propagating errors, 1986"

    def run(self, graph: JointGraph) -> PassResult:
        """Nothing to do."""
        return PassResult(graph, False)
