"""Feedback alignment: input cotangents through fixed random weights."""

from __future__ import annotations

from dataclasses import dataclass

from graphrewrite.passes.rules._feedback import Distribution
from graphrewrite.passes.rules._feedback_weights import (
    Fans,
    FeedbackRule,
    Scheme,
    WeightRead,
    deviation,
    fill_weights,
)
from torch import fx

from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class FeedbackAlignment(FeedbackRule):
    """Take every input cotangent at a fixed random weight B in the place of W: delta_l = B^T delta_{l+1} * phi'.

    Weight gradients are the exact local ones, G = delta h^T, and everything without weights (normalisation,
    attention scores, pooling, residual adds) keeps its exact derivative. B has the shape of W, one per parameter.

    Args:
        only: Globs on module paths; weights of other modules keep their exact input cotangent.
        skip: Globs on module paths whose weights keep it.
        init: Standard deviation of B: `"xavier"`, sqrt(2 / (in + out)), or `"kaiming"`, 1 / sqrt(3 in).
        distribution: `"uniform"` or `"normal"`.
        scale: Factor on B.
    """

    init: Scheme = "xavier"
    distribution: Distribution = "uniform"
    scale: float = 1.0

    name = "fa"
    summary = "feedback alignment: fixed random weights carry the cotangent back"
    formula = "δ_l = (B_{l+1}ᵀ δ_{l+1}) ⊙ φ'(z_l)"
    paper = "Lillicrap et al., Random synaptic feedback weights support error backpropagation for deep learning, 2016"

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """A fixed random B."""
        std = self.scale * deviation(self.init, Fans.of(weight, read))
        return self.weight_state(graph, weight, fill_weights(self.distribution, std))
