"""Direct feedback alignment: every block gets the output error through a fixed random matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from graphrewrite.passes.rules._feedback import (
    Injection,
    ProjectedSignal,
    Projection,
    fill_feedback,
    output_errors,
    random_product,
)
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class DirectFeedbackAlignment(ProjectedSignal):
    """Redirect the cotangent at every boundary between blocks: delta_l = e B_l instead of W^T delta_{l+1}.

    The graph is cut at each tensor that leaves a block for another one, and `e B_l` enters there, e being the
    cotangent of the model's output as it arrives (it holds the 1/batch of a mean loss). From there down to the
    previous cut the derivative is exact: attention, normalisation, residuals and convolutions inside a block keep
    their own VJP. The last block is trained by the exact gradient.

    An error that is not finite is projected like any other: NaN and infinity reach the gradients of every block, as
    they do under backpropagation, so that a `GradScaler` or a check on the gradients sees them.

    Its other options are those of `ProjectedSignal`.

    Args:
        generated: Store no feedback weights: they are drawn from (seed, boundary) in every step, the same ones each
            time. Backend `triton` draws them inside of the product: the matrix never exists in memory.
    """

    generated: bool = False

    name = "dfa"
    summary = "direct feedback alignment: the output error through fixed random matrices"
    formula = "δ_l = (e B_l) ⊙ φ'(z_l)"
    paper = "Nøkland, Direct Feedback Alignment Provides Learning in Deep Neural Networks, 2016; Launay et al. 2020"

    def sources(self, graph: JointGraph) -> list[fx.Node]:
        """The cotangents of the model's outputs."""
        return [error for _, error in output_errors(graph)]

    def requires(self, graph: JointGraph) -> None:
        """Two blocks at least, and options that go together."""
        super().requires(graph)
        fill_feedback(self.distribution, self.scale)
        if self.generated and self.shared:
            raise RuleError(
                "feedback weights that are not stored need not be shared", remedy="drop shared or generated"
            )

    def feedback(self, graph: JointGraph, one: Injection, width: int) -> fx.Node:
        """State of the rule, or the seed that it is drawn from."""
        return graph.counter() if self.generated else super().feedback(graph, one, width)

    def signal(self, graph: JointGraph, one: Injection) -> tuple[Callable[..., torch.Tensor], list[fx.Node]]:
        """The error, projected."""
        projection = one.projection
        if self.generated:
            return self._drawn(graph, projection), [one.source]

        def project(weight: torch.Tensor, like: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
            return projection(error, weight[:, : projection.features], like)

        return project, [one.source]

    def _drawn(self, graph: JointGraph, projection: Projection) -> Callable[..., torch.Tensor]:
        product, stream = graph.context.form(random_product), graph.stream()
        bound = self.scale / math.sqrt(projection.features)

        def project(counter: torch.Tensor, like: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
            rows = projection.gathered(error)
            made = product(rows, counter, stream, projection.features, self.distribution, bound)
            return projection.spread(made, like)

        return project
