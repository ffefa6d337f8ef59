"""The straight-through derivative of sampled categories and of step functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from graphrewrite.passes.rules._sampling import SampleDerivative, Step, find_steps, softmax_vjp
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class StraightThrough(SampleDerivative):
    """Give one-hot vectors the derivative of a softmax, and step functions that of the identity.

    One-hot vectors D chosen by logits theta: the cotangent of theta is J(softmax(theta / tau)) g, J(p) = diag(p) -
    p p^T, g being the cotangent of D. They are found on the graph: `gumbel_softmax(hard=True)`, and one-hot vectors
    of an arg max, with noise or without, or of a multinomial drawn from a softmax.

    Step functions (`sign`, `round`, `floor`, `ceil`, `trunc`, and comparisons with a number that are cast to float):
    the cotangent passes as it is, or where |x| <= `clip` only. One that no cotangent reaches, because the model
    writes its own straight-through form with `detach`, is left alone.

    `rule="straight_through"` is backpropagation with this pass; `passes=["straight_through"]` combines it with any
    rule.

    Args:
        tau: Temperature of the softmax in the derivative; that of the sampling does not enter.
        clip: Step functions pass the cotangent only where the argument is at most this large.
        only: Globs of module paths: leave samples and steps of other modules alone.
        skip: Globs of module paths whose samples and steps are left alone.
    """

    clip: float | None = None

    name = "straight_through"
    summary = "straight-through derivative of sampled one-hot vectors and step functions"
    formula = "∂θ = J(softmax(θ/τ)) g, J(p) = diag(p) − p pᵀ; steps: ∂x = g, or g·1[|x| ≤ clip]"
    paper = "Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons, 2013"

    def requires(self, graph: JointGraph) -> None:
        """Positive options."""
        if self.tau <= 0 or (self.clip is not None and self.clip <= 0):
            raise RuleError(f"straight_through needs positive tau and clip, got tau={self.tau}, clip={self.clip}")

    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """One-hot vectors, then steps."""
        tau = self.tau

        def derivative(logits: torch.Tensor, _sample: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
            return softmax_vjp((logits / tau).softmax(-1), cotangent)

        count = self.replace_one_hots(graph, wanted, derivative, sampled_only=False)
        for step in find_steps(graph, lambda text, node: self.fail(graph, text, node)):
            if wanted(step.result) and self._replace_step(graph, step):
                count += 1
        return count

    def _replace_step(self, graph: JointGraph, step: Step) -> bool:
        clip = self.clip

        def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> torch.Tensor:
            (argument,) = residuals
            passed = cotangent.to(argument.dtype) * step.sign
            return passed if clip is None else torch.where(argument.abs() <= clip, passed, 0.0)

        if step.own:
            graph.replace_vjp(step.result, bwd, residuals=[step.argument])
            return True
        return self._replace(graph, step.result, step.argument, bwd, [step.argument])
