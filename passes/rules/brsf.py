"""Batchwise random-magnitude sign-concordant feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from graphrewrite.passes.rules._feedback import Distribution
from graphrewrite.passes.rules._feedback_weights import (
    Fans,
    FeedbackRule,
    Scheme,
    WeightRead,
    deviation,
    feedback_info,
    same_on_all_ranks,
)
from torch import fx

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class BatchwiseSignFeedback(FeedbackRule):
    """Take every input cotangent at B = |M_t| sign(W), M_t drawn anew in each training step.

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

    name = "brsf"
    summary = "batchwise random-magnitude sign feedback: signs of the weights, magnitudes drawn in each step"
    formula = "δ_l = (Bᵀ δ_{l+1}) ⊙ φ'(z_l),  B = |M_t| ⊙ sign(W)"
    paper = "Liao, Leibo, Poggio, How Important Is Weight Symmetry in Backpropagation?, 2016"

    def requires(self, graph: JointGraph) -> None:
        """A known distribution."""
        if self.distribution not in ("uniform", "normal"):
            raise RuleError(f"distribution={self.distribution!r} is unknown", remedy="use 'uniform' or 'normal'")

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """The sign of the weight times a magnitude of this step."""
        std = self.scale * deviation(self.init, Fans.of(weight, read))
        stream = graph.stream()

        def feedback(w: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
            # |U[-b, b)| has the law of U[0, b)
            shared = same_on_all_ranks(counter)
            if self.distribution == "uniform":
                magnitude = random.uniform(shared, stream, w.shape, w.dtype) * (std * math.sqrt(3.0))
            else:
                magnitude = random.normal(shared, stream, w.shape, w.dtype).abs() * std
            return magnitude * w.sign()

        made: fx.Node = graph.splice(feedback, [weight, graph.counter()], like=feedback_info(read), whole=False)
        return made
