"""Uniform sign-concordant feedback: input cotangents through the signs of the weights."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.passes.rules._feedback_weights import (
    Fans,
    FeedbackRule,
    Scheme,
    WeightRead,
    deviation,
    feedback_info,
)
from torch import fx

from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class UniformSignFeedback(FeedbackRule):
    """Take every input cotangent at B = s sign(W), read anew in each step; s is one number per parameter.

    Args:
        only: Globs on module paths; weights of other modules keep their exact input cotangent.
        skip: Globs on module paths whose weights keep it.
        init: s: `"xavier"`, sqrt(2 / (in + out)), or `"kaiming"`, 1 / sqrt(3 in).
        scale: Factor on s.
    """

    init: Scheme = "xavier"
    scale: float = 1.0

    name = "usf"
    summary = "uniform sign feedback: the signs of the weights carry the cotangent back"
    formula = "δ_l = (Bᵀ δ_{l+1}) ⊙ φ'(z_l),  B = s sign(W)"
    paper = "Liao, Leibo, Poggio, How Important Is Weight Symmetry in Backpropagation?, 2016"

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """The scaled sign of the weight."""
        size = self.scale * deviation(self.init, Fans.of(weight, read))
        made: fx.Node = graph.splice(lambda w: w.sign() * size, [weight], like=feedback_info(read), whole=False)
        return made
