"""Product feedback alignment: the feedback weight is a fixed matrix times one that learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.rules._feedback_weights import (
    Fans,
    FeedbackRule,
    Scheme,
    WeightRead,
    deviation,
    feedback_info,
    fill_weights,
    group_count,
    output_axis,
)
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import fix, value


@dataclass(frozen=True)
class ProductFeedbackAlignment(FeedbackRule):
    """Take every input cotangent at the product B R, B fixed, R learned with the gradient B^T G of B^T W.

    delta goes back in two stages, delta_R = B^T delta and R^T delta_R; their product is what the derivative reads in
    the place of W, so a convolution does not run twice. R is yielded by `compiled.parameters()`. Under SGD with weight
    decay d and learning rate r, R - B^T W shrinks by 1 - r d a step, on any data, so B R tends to B B^T W, and B B^T
    is close to the identity. The published runs use a very large decay in the first epoch, which kills the difference
    at once: `decay` and `decay_steps`, or the weight decay of the optimizer.

    A parameter with n outputs gets B of n x k n and R like W with k n outputs (per group of a grouped convolution).

    Args:
        only: Globs on module paths; weights of other modules keep their exact input cotangent.
        skip: Globs on module paths whose weights keep it.
        expand: The expansion ratio k.
        orthogonal: B with orthonormal rows, usually with `expand=1`; else Xavier uniform with gain
            sqrt((1 + 1/k) / 2 / density), for which the mean of B B^T is the identity.
        density: Share of the elements of a random B that are not zero.
        decay: Added to the gradients of W and R, times W and R, in the first `decay_steps` steps.
        decay_steps: How many training calls `decay` lasts: those of the first epoch.
        init: Standard deviation of R at first: `"xavier"` or `"kaiming"`, by the fans of W.
    """

    expand: int = 10
    orthogonal: bool = False
    density: float = 1.0
    decay: float = 0.0
    decay_steps: int = 0
    init: Scheme = "xavier"

    name = "pfa"
    summary = "product feedback alignment: a fixed and a learned matrix carry the cotangent back"
    formula = "δ_l = Rᵀ (Bᵀ δ_{l+1}) ⊙ φ'(z_l);  G_R = Bᵀ G_W"
    paper = "Li et al., Deep learning without weight symmetry (product feedback alignment), 2024"
    learns_state = True

    def requires(self, graph: JointGraph) -> None:
        """Options in range."""
        if self.expand < 1 or self.expand != int(self.expand):
            raise RuleError(f"expand={self.expand!r} must be a whole number of at least 1", remedy="the papers use 10")
        if not 0.0 < self.density <= 1.0:
            raise RuleError(f"density={self.density!r} must lie in (0, 1]", remedy="1 gives a dense B")
        if self.orthogonal and self.density != 1.0:
            raise RuleError("an orthogonal B is dense", remedy="drop density= or orthogonal=")
        if (self.decay > 0) != (self.decay_steps > 0):
            raise RuleError(
                f"decay={self.decay!r} and decay_steps={self.decay_steps!r} go together",
                remedy="give the decay of the first epoch and its number of steps, or neither",
            )

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """The product of a fixed B and a learned R."""
        shape = [fix(size) for size in value(weight).shape]
        axis, groups = output_axis(read), group_count(read)
        width = shape[axis] // groups
        layout = _Layout(axis, groups)
        held = {"dtype": value(weight).dtype, "device": value(weight).device}
        fixed = graph.add_state(
            self.feedback_name(weight), (shape[axis], self.expand * width), self._fill(width, groups), **held
        )
        learned = graph.add_state(
            self.feedback_name(weight, "path"),
            [size * self.expand if i == axis else size for i, size in enumerate(shape)],
            fill_weights("uniform", deviation(self.init, Fans.of(weight, read))),
            trainable=True,
            **held,
        )
        if weight in graph.leaves:
            self._learn(graph, weight, fixed, learned, layout)
        made: fx.Node = graph.splice(layout.product, [fixed, learned], like=feedback_info(read), whole=False)
        return made

    def _learn(self, graph: JointGraph, weight: fx.Node, fixed: fx.Node, learned: fx.Node, layout: _Layout) -> None:
        if not self.decay:
            graph.map_gradient(learned, layout.back, [fixed], of=weight)
            return

        def decayed(gradient: torch.Tensor, w: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
            return gradient + (self.decay * (counter[1] < self.decay_steps)).to(w.dtype) * w

        def path(gradient: torch.Tensor, b: torch.Tensor, r: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
            return decayed(layout.back(gradient, b), r, counter)

        counter = graph.counter()
        graph.map_gradient(weight, decayed, [weight, counter])
        graph.map_gradient(learned, path, [fixed, learned, counter], of=weight)

    def _fill(self, width: int, groups: int) -> Any:
        def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
            if self.orthogonal:
                for rows in tensor.view(groups, width, -1).unbind():
                    torch.nn.init.orthogonal_(rows, generator=generator)
                return
            bound = math.sqrt(3.0 / (self.expand * width * self.density))
            tensor.uniform_(-bound, bound, generator=generator)
            if self.density < 1.0:
                tensor.mul_(torch.empty_like(tensor).bernoulli_(self.density, generator=generator))

        return fill


@dataclass(frozen=True)
class _Layout:
    """How B multiplies tensors with the layout of a weight: along its outputs, each group by itself."""

    axis: int
    groups: int

    def _along(self, b: torch.Tensor, weight: torch.Tensor, *, transpose: bool) -> torch.Tensor:
        front = weight.movedim(self.axis, 0) if self.axis else weight
        if self.groups == 1:
            out = (b.t() if transpose else b) @ front.reshape(front.shape[0], -1)
        else:
            each = b.reshape(self.groups, -1, b.shape[1])
            rows = front.reshape(self.groups, front.shape[0] // self.groups, -1)
            out = torch.bmm(each.transpose(1, 2) if transpose else each, rows)
        out = out.reshape(-1, *front.shape[1:])
        return out.movedim(0, self.axis).contiguous() if self.axis else out

    def product(self, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """B R."""
        return self._along(b, r, transpose=False)

    def back(self, gradient: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B^T G."""
        return self._along(b, gradient, transpose=True)
