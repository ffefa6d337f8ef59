"""ReinMax: a second-order straight-through derivative for sampled categories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from graphrewrite.passes.rules._sampling import SampleDerivative, softmax_vjp
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class ReinMax(SampleDerivative):
    """Give sampled one-hot vectors ReinMax's derivative; everything else keeps its own.

    For D ~ Cat(pi_0), pi_0 = softmax(theta), and the cotangent g of D, with pi_1 = (softmax(theta / tau) + D) / 2 and
    J(p) = diag(p) - p p^T: the cotangent of theta is 2 J(pi_1) g - J(pi_0) g / 2, minus its mean over the categories.
    At tau = 1 its expectation is the exact gradient of E[f(D)] for quadratic f.

    Samples are found on the graph: `gumbel_softmax(hard=True)`, a one-hot vector of an arg max over logits with added
    noise, or of a multinomial drawn from a softmax. `rule="reinmax"` is backpropagation with this pass;
    `passes=["reinmax"]` combines it with any rule.

    Args:
        tau: Temperature of the softmax in pi_1, at least 1; that of the sampling does not enter.
        only: Globs of module paths: leave samples of other modules alone.
        skip: Globs of module paths whose samples are left alone.
    """

    name = "reinmax"
    summary = "ReinMax: second-order derivative of sampled one-hot vectors"
    formula = "∂θ = 2 J(π₁) g − ½ J(π₀) g, π₁ = ½(softmax(θ/τ) + D), J(p) = diag(p) − p pᵀ"
    paper = "Liu, Dong, Liu, Yu, Gao: Bridging Discrete and Backpropagation: Straight-Through and Beyond, 2023"

    def requires(self, graph: JointGraph) -> None:
        """A temperature of at least 1."""
        if self.tau < 1:
            raise RuleError(f"reinmax needs tau >= 1, got {self.tau}", remedy="use tau=1, or straight_through")

    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """All samples; an arg max without noise is none."""
        tau = self.tau

        def derivative(logits: torch.Tensor, sample: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
            first = 0.5 * ((logits / tau).softmax(-1) + sample)
            found = 2 * softmax_vjp(first, cotangent) - 0.5 * softmax_vjp(logits.softmax(-1), cotangent)
            return found - found.mean(-1, keepdim=True)

        return self.replace_one_hots(graph, wanted, derivative, sampled_only=True)
