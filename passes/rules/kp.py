"""Kolen-Pollack: feedback weights that learn from the gradient of the weights they stand for."""

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
class KolenPollack(FeedbackRule):
    """Feedback alignment whose B is a parameter with the gradient of W.

    B has the shape of W and is yielded by `compiled.parameters()`, so an optimizer gives both the same update.
    With SGD, weight decay d and learning rate r, B - W shrinks by 1 - r d a step, on any data: the feedback turns
    into the transposed weights without reading them. The same holds for AdamW, whose decay is decoupled. With
    momentum the difference follows the same linear recurrence as a weight without gradient. Optimizers that divide
    by a running size of the gradient *with* the decay inside (Adam with `weight_decay`) break it; without decay
    every element-wise optimizer keeps B - W constant. W and B must be in parameter groups with the same options.

    Args:
        only: Globs on module paths; weights of other modules keep their exact input cotangent.
        skip: Globs on module paths whose weights keep it.
        init: Standard deviation of B at first: `"xavier"` or `"kaiming"`, see `fa`.
        distribution: `"uniform"` or `"normal"`.
        scale: Factor on B at first.
    """

    init: Scheme = "xavier"
    distribution: Distribution = "uniform"
    scale: float = 1.0

    name = "kp"
    summary = "Kolen-Pollack: feedback weights that get the same gradient as the weights"
    formula = "W ← λW − η δ hᵀ;  B ← λB − η (δ hᵀ)"
    paper = "Kolen and Pollack, Backpropagation without weight transport, 1994; Akrout et al. 2019"
    learns_state = True

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """A learned B; a frozen W gives it no gradient."""
        std = self.scale * deviation(self.init, Fans.of(weight, read))
        state = self.weight_state(graph, weight, fill_weights(self.distribution, std), trainable=True)
        if weight in graph.leaves:
            graph.map_gradient(state, of=weight)
        return state
