"""Direct feedback alignment: every block gets the output error through a fixed random matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from graphrewrite.passes.rules._boundary import names_of
from graphrewrite.passes.rules._feedback import (
    Distribution,
    Projection,
    fill_feedback,
    hidden_boundaries,
    output_errors,
)

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class DirectFeedbackAlignment(Rule):
    """Redirect the cotangent at every boundary between blocks: delta_l = e B_l instead of W^T delta_{l+1}.

    The graph is cut at each tensor that leaves a block for another one, and `e B_l` enters there, e being the
    cotangent of the model's output as it arrives (it holds the 1/batch of a mean loss). From there down to the
    previous cut the derivative is exact: attention, normalisation, residuals and convolutions inside a block keep
    their own VJP. The last block is trained by the exact gradient.

    Args:
        shared: One matrix for all boundaries; a boundary of n features uses its first n columns (TinyDFA).
        distribution: `"uniform"` on [-1, 1) times `scale` / sqrt(n), or `"normal"` of the same variance; n is the
            number of features of the boundary (the largest one, if shared).
        scale: Factor on the feedback weights.
        spatial: Feedback weights for positions that the error does not have: `"dense"`: own ones for every position;
            `"tile"`: the same for all; `"auto"`: dense for maps behind convolutions, if the matrix has at most
            `limit` elements, tiled for sequences. Dense feedback holds for one input size.
        limit: See `spatial`.
    """

    shared: bool = False
    distribution: Distribution = "uniform"
    scale: float = 1.0
    spatial: str = "auto"
    limit: int = 1 << 24

    name = "dfa"
    summary = "direct feedback alignment: the output error through fixed random matrices"
    formula = "δ_l = (e B_l) ⊙ φ'(z_l)"
    paper = "Nøkland, Direct Feedback Alignment Provides Learning in Deep Neural Networks, 2016; Launay et al. 2020"
    objective: ClassVar = "global"

    def requires(self, graph: JointGraph) -> None:
        """Two blocks at least, and known options."""
        if self.spatial not in ("auto", "dense", "tile"):
            raise RuleError(f"spatial={self.spatial!r} is unknown", remedy="use 'auto', 'dense' or 'tile'")
        if len(graph.blocks) < 2:
            raise RuleError(
                "dfa needs at least two blocks: with one, nothing is left to redirect",
                remedy="choose finer blocks: blocks='layers' or a list of module globs",
            )

    def run(self, graph: JointGraph) -> PassResult:
        """Redirect every boundary of this rule's blocks."""
        errors = output_errors(graph)
        targets = hidden_boundaries(graph)
        planned = [
            (name, number, boundary, consumers, error, Projection.between(error, boundary, self.spatial, self.limit))
            for name, (boundary, consumers) in zip(names_of([b for b, _ in targets]), targets, strict=True)
            for number, (_, error) in enumerate(errors)
        ]
        widest = max((projection.features for *_, projection in planned), default=1)
        with graph.deferred():
            for name, number, boundary, consumers, error, projection in planned:
                width = widest if self.shared else projection.features
                weight = graph.add_state(
                    self.state_name(f"feedback.{'shared' if self.shared else name}{f'.{number}' if number else ''}"),
                    (projection.classes, width),
                    fill_feedback(self.distribution, self.scale / math.sqrt(width)),
                    dtype=value(error).dtype,
                )
                graph.redirect(boundary, _signal(projection), [error, weight, boundary], consumers=consumers)
        return PassResult(graph, bool(planned))


def _signal(projection: Projection) -> Callable[..., torch.Tensor]:
    def signal(error: torch.Tensor, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return projection(error, weight[:, : projection.features], like)

    return signal
