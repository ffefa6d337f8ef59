"""Fixed random-magnitude sign-concordant feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.rules._feedback import Distribution, Fill
from graphrewrite.passes.rules._feedback_weights import (
    Fans,
    FeedbackRule,
    Scheme,
    WeightRead,
    deviation,
    feedback_info,
    fill_weights,
)
from torch import fx

from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class FixedSignFeedback(FeedbackRule):
    """Take every input cotangent at B = |M| sign(W), M drawn once and the sign read anew in each step.

    Args:
        only: Globs on module paths; weights of other modules keep their exact input cotangent.
        skip: Globs on module paths whose weights keep it.
        init: Standard deviation of M: `"xavier"`, sqrt(2 / (in + out)), or `"kaiming"`, 1 / sqrt(3 in).
        distribution: `"uniform"` or `"normal"`.
        scale: Factor on M.
    """

    init: Scheme = "xavier"
    distribution: Distribution = "uniform"
    scale: float = 1.0

    name = "frsf"
    summary = "fixed random-magnitude sign feedback: signs of the weights, magnitudes drawn once"
    formula = "δ_l = (Bᵀ δ_{l+1}) ⊙ φ'(z_l),  B = |M| ⊙ sign(W)"
    paper = "Liao, Leibo, Poggio, How Important Is Weight Symmetry in Backpropagation?, 2016"

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """The sign of the weight times a fixed magnitude."""
        std = self.scale * deviation(self.init, Fans.of(weight, read))
        magnitude = self.weight_state(
            graph, weight, _absolute(fill_weights(self.distribution, std)), prefix="magnitude"
        )
        made: fx.Node = graph.splice(
            lambda w, m: m * w.sign(), [weight, magnitude], like=feedback_info(read), whole=False
        )
        return made


def _absolute(fill: Fill) -> Fill:
    def absolute(tensor: torch.Tensor, generator: torch.Generator) -> Any:
        fill(tensor, generator)
        return tensor.abs_()

    return absolute
