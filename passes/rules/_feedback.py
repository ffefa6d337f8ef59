"""Common parts of rules that carry the output error to the blocks by feedback weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from graphrewrite.passes.rules._boundary import is_map
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import fix, hint, info, value

Distribution = Literal["uniform", "normal"]
Fill = Callable[[torch.Tensor, torch.Generator], Any]


def fill_feedback(distribution: str, bound: float) -> Fill:
    """Fills with U[-bound, bound) or with a normal of the same variance, bound^2 / 3."""
    if distribution == "uniform":
        return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)
    if distribution == "normal":
        return lambda tensor, generator: tensor.normal_(0.0, bound / math.sqrt(3.0), generator=generator)
    raise RuleError(f"distribution={distribution!r} is unknown", remedy="use 'uniform' or 'normal'")


def output_errors(graph: JointGraph) -> list[tuple[fx.Node, fx.Node]]:
    """The outputs of the last block that has any, with their cotangents: where the error enters the network.

    Outputs of earlier blocks (a cache, hidden states) are not the network's answer and carry no error here.
    """
    rank = {block.name: block.index for block in graph.blocks}
    found = [(o, c) for o in graph.model_outputs if (c := graph.cotangent(o)) is not None]
    if not found:
        raise RuleError("no output of the model has a cotangent", remedy="the loss must depend on the model's output")
    last = max(rank.get(info(o).block, -1) for o, _ in found)
    return [(o, c) for o, c in found if rank.get(info(o).block, -1) == last]


@dataclass(frozen=True)
class Projection:
    """How an error of shape (batch dims, ..., classes) reaches a boundary of shape (batch dims, ..., features).

    Attributes:
        batch: How many leading dimensions the two share: samples; samples and tokens; nodes.
        axis: The boundary's feature dimension: 1 behind convolutions, the last one otherwise.
        tiled: Whether every other position gets the same signal; else each has feedback weights of its own.
        features: Rows of feedback weights that are needed.
        classes: Size of the error's last dimension.
    """

    batch: int
    axis: int
    tiled: bool
    features: int
    classes: int

    @staticmethod
    def between(error: fx.Node, boundary: fx.Node, spatial: str, limit: int) -> Projection:
        """Choose the projection for a boundary.

        Args:
            error: The cotangent of the output.
            boundary: The value it is carried to.
            spatial: `"dense"`: own weights for every position; `"tile"`: one signal for all; `"auto"`: dense for maps
                behind convolutions, if the matrix has at most `limit` elements, tiled for sequences.
            limit: See `spatial`.
        """
        e, h = value(error), value(boundary)
        classes = fix(e.shape[-1])
        batch = 0
        while batch < min(e.dim() - 1, h.dim() - 1) and str(e.shape[batch]) == str(h.shape[batch]):
            batch += 1
        if batch == 0:
            raise RuleError(
                f"the output error {tuple(e.shape)} and the boundary {tuple(h.shape)} share no batch dimension",
                node=boundary.name,
                module=info(boundary).module,
                remedy="keep the batch dimension first, or choose blocks that do",
            )
        rest = list(h.shape[batch:])
        channels_first = len(rest) > 1 and is_map(boundary)
        axis = batch if channels_first else h.dim() - 1
        dense = len(rest) == 1 or spatial == "dense"
        if spatial == "auto" and channels_first:
            dense = classes * math.prod(hint(size) for size in rest) <= limit
        # feedback weights need a size: from here on the graph holds for this one only, and is captured again for
        # another
        features = math.prod(fix(size) for size in rest) if dense else fix(h.shape[axis])
        return Projection(batch, axis, not dense, features, classes)

    def __call__(self, error: torch.Tensor, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The signal: `error @ weight`, weight of shape (classes, features), in the shape and dtype of `like`."""
        extra = tuple(range(self.batch, error.dim() - 1))
        if extra:
            # positions that the boundary does not have (a mask per pixel, a token per sequence) add up
            error = error.sum(extra)
        signal = (error.to(weight.dtype) @ weight).to(like.dtype)
        if self.tiled:
            shape = [*like.shape[: self.batch], *([1] * (like.dim() - self.batch))]
            shape[self.axis] = self.features
            return signal.reshape(shape).expand(like.shape)
        return signal if signal.dim() == like.dim() else signal.reshape(like.shape)


def hidden_boundaries(graph: JointGraph) -> list[tuple[fx.Node, Sequence[fx.Node]]]:
    """The boundaries of the running rule's blocks that lead on into the model, with the consumers they lead to."""
    found: list[tuple[fx.Node, Sequence[fx.Node]]] = []
    for block in graph.rule_blocks():
        for boundary in graph.boundaries(block.name):
            consumers = graph.crossing(boundary, loss=False)
            if consumers:
                found.append((boundary, consumers))
    return found
