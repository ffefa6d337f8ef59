"""Parts of the Forward-Forward family: goodness, its losses, passes over several labels, and read-outs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from graphrewrite.passes.rules._boundary import feature_axis, names_of
from torch import fx
from torch.nn import functional as F

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import NodeInfo, Role, Target, UserInput, fix, info, same_size, value

Collaboration = Literal["none", "previous", "all"]


@dataclass(frozen=True)
class Contrast:
    """How positive and negative samples are told apart by the output of a block.

    Attributes:
        goodness: Of an output h: `"sum"` or `"mean"` of its squares.
        threshold: Theta per unit; the goodness at which a sample counts as positive is `threshold` times the number
            of units for the sum, `threshold` itself for the mean.
        loss: `"hinton"`: cross-entropy of goodness - theta, positives and negatives weighing the same; `"symba"`:
            softplus(-alpha (g+ - g-)), without a threshold.
        alpha: See `loss`.
        per_unit: False: theta of the sum is `threshold` itself.
        negatives: Negative samples per sample.
    """

    goodness: str
    threshold: float
    loss: str
    alpha: float
    per_unit: bool = True
    negatives: int = 1

    def scorer(self, graph: JointGraph) -> Callable[..., torch.Tensor]:
        """Goodness minus theta of the samples of one or several passes, (samples,), in the form for a graph."""
        goodness = graph.context.form(mean_square if self.goodness == "mean" else sum_of_squares)

        def score(*outputs: torch.Tensor) -> torch.Tensor:
            scores = [goodness(h) - self._theta(h) for h in outputs]
            return torch.cat(scores) if len(scores) > 1 else scores[0]

        return score

    def _theta(self, h: torch.Tensor) -> Any:
        per_unit = self.per_unit and self.goodness != "mean"
        return self.threshold * (math.prod(h.shape[1:]) if per_unit else 1)

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The loss of one output.

        Args:
            positive: Scores of the positive samples, (batch,).
            negative: Scores of the negative ones, (negatives * batch,), one negative of each sample after the other.
            counted: Which samples count, (batch,).
        """
        negative = negative.reshape(self.negatives, -1)
        if self.loss == "symba":
            values = F.softplus(-self.alpha * (positive - negative)).mean(0)
        else:
            values = 0.5 * (F.softplus(-positive) + F.softplus(negative).mean(0))
        return masked_mean(values, counted)


def in_single(h: torch.Tensor) -> torch.Tensor:
    """Half-precision values in float32: sums over them, and what learns from the sums, need the digits."""
    return h.float() if h.dtype in (torch.float16, torch.bfloat16) else h


def sum_of_squares(h: torch.Tensor) -> torch.Tensor:
    """Of each sample."""
    return in_single(h.flatten(1)).square().sum(1)


def mean_square(h: torch.Tensor) -> torch.Tensor:
    """Of each sample."""
    return in_single(h.flatten(1)).square().mean(1)


def masked_mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The mean of the values that count; 0 if none does."""
    weight = counted.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)


# --- passes --------------------------------------------------------------------------------------------------------


def shares_batch(graph: JointGraph) -> bool:
    """Whether another input goes along with the batch (edges, a mask): then a batch cannot just be repeated."""
    tensors = [n for s, n in graph.inputs.items() if isinstance(s, UserInput) and isinstance(value(n), torch.Tensor)]
    return len(tensors) > 1


def run_passes(
    graph: JointGraph, x: fx.Node, inputs: Sequence[fx.Node], label: str, *, loss: bool = False
) -> list[dict[fx.Node, fx.Node]]:
    """One forward pass for each input in the place of `x`; they are called `label`, `label1`, ..."""
    labels = [f"{label}{i or ''}" for i in range(len(inputs))]
    return [
        graph.clone_forward({x: new, **sized_like(graph, x, new, one)}, one, loss=loss)
        for new, one in zip(inputs, labels, strict=True)
    ]


def sized_like(graph: JointGraph, x: fx.Node, new: fx.Node, label: str) -> dict[fx.Node, fx.Node]:
    """Targets as long as the pass's input, if it is longer than `x`.

    A size that inputs and targets share is one symbol, and the captured forward may read it off the targets.
    """
    if same_size(value(new).shape[0], value(x).shape[0]):
        return {}
    targets = [n for s, n in graph.inputs.items() if isinstance(s, Target) and value(n).dim() > 0]
    return {
        target: graph.splice(
            lambda t, new: t.new_zeros([new.shape[0], *t.shape[1:]]), [target, new], like=pass_info(graph, label)
        )
        for target in targets
    }


def pass_info(graph: JointGraph, label: str) -> NodeInfo:
    """For nodes that make the input of a pass: they belong to the first block."""
    first = graph.blocks[0].name
    return NodeInfo(role=Role.FORWARD, block=first, module=first, copy=label)


# --- teaching ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Peer normalisation: `weight * mean_j (mean(m) - m_j)^2`, m the running mean activity on positives."""

    weight: float
    momentum: float

    def activity(self, mean: torch.Tensor, h: torch.Tensor, axis: int) -> torch.Tensor:
        """The running mean after a batch."""
        batch = h.to(mean.dtype).mean(dim=tuple(d for d in range(h.dim()) if d != axis))
        return self.momentum * mean + (1 - self.momentum) * batch

    def loss(self, mean: torch.Tensor, h: torch.Tensor, axis: int) -> torch.Tensor:
        """The penalty of a batch."""
        m = self.activity(mean, h, axis)
        return self.weight * (m.mean() - m).square().mean()

    def state(self, graph: JointGraph, name: str, boundary: fx.Node, h: fx.Node) -> fx.Node:
        """The running mean of a boundary, 0.5 at first, updated by its positive pass."""
        axis = feature_axis(boundary)
        size = fix(value(boundary).shape[axis])
        node = graph.add_state(name, (size,), lambda tensor, _generator: tensor.fill_(0.5))
        graph.update_state(name, lambda mean, h: self.activity(mean, h, axis), [h])
        return node


@dataclass(frozen=True)
class Taught:
    """A boundary that is taught by its goodness.

    Attributes:
        boundary: In the captured forward.
        positive: In the positive pass.
        negative: In each negative pass.
    """

    boundary: fx.Node
    positive: fx.Node
    negative: tuple[fx.Node, ...]


def teach_goodness(
    graph: JointGraph,
    outputs: Sequence[Taught],
    counted: fx.Node,
    contrast: Contrast,
    *,
    collaboration: str = "none",
    peer: Peer | None = None,
    state_name: Callable[[str], str] = str,
) -> None:
    """Teach every block by the goodness of its outputs; a block of several outputs learns from the sum.

    With collaboration, the goodness of the other outputs is added to each one's own, as a constant: it tells how
    well the rest of the network does on the sample already.
    """
    scores, score = [], contrast.scorer(graph)
    for one in outputs:
        like = NodeInfo(role=Role.LOSS, block=info(one.boundary).block, module=info(one.boundary).block)
        scores.append(
            (
                graph.splice(score, [one.positive], like=like),
                graph.splice(score, one.negative, like=like),
            )
        )
    names = names_of([one.boundary for one in outputs])
    terms: dict[str, list[int]] = {}
    for i, one in enumerate(outputs):
        terms.setdefault(info(one.boundary).block, []).append(i)
    for block, members in terms.items():
        inputs: list[fx.Node] = [counted]
        parts: list[Callable[..., torch.Tensor]] = []
        for i in members:
            others = [t for t in range(len(outputs)) if t != i and (collaboration == "all" or t < i)]
            others = [] if collaboration == "none" else others
            helping = [node for t in others for node in scores[t]]
            parts.append(_joined(contrast, len(inputs), len(others)))
            inputs += [*scores[i], *helping]
            if peer is not None:
                one = outputs[i]
                mean = peer.state(graph, state_name(f"activity.{names[i]}"), one.boundary, one.positive)
                parts.append(_peer_term(peer, len(inputs), feature_axis(one.boundary)))
                inputs += [mean, one.positive]
        graph.teach(block, _sum_of(parts), inputs)


def _joined(contrast: Contrast, start: int, others: int) -> Callable[..., torch.Tensor]:
    """The loss of one output, whose scores stand from `start` on among the inputs, those of `others` behind them."""

    def term(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        positive, negative = inputs[start], inputs[start + 1]
        for k in range(1, others + 1):
            positive = positive + inputs[start + 2 * k].detach()
            negative = negative + inputs[start + 2 * k + 1].detach()
        return contrast(positive, negative, inputs[0])

    return term


def _peer_term(peer: Peer, start: int, axis: int) -> Callable[..., torch.Tensor]:
    def term(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return peer.loss(inputs[start], inputs[start + 1], axis)

    return term


def _sum_of(parts: Sequence[Callable[..., torch.Tensor]]) -> Callable[..., torch.Tensor]:
    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        total = parts[0](inputs)
        for part in parts[1:]:
            total = total + part(inputs)
        return total

    return loss


# --- checks --------------------------------------------------------------------------------------------------------


def known(option: str, given: Any, values: Sequence[str]) -> None:
    """Refuse a value of an option that is none of `values`."""
    if given not in values:
        raise RuleError(f"{option}={given!r} is unknown", remedy=f"use {' or '.join(map(repr, values))}")


def refuse_silent_blocks(graph: JointGraph, names: Sequence[str]) -> None:
    """A block that learns needs a floating-point output for an objective of its own."""
    for name in names:
        learns = any(info(user).block == name for leaf in graph.leaves for user in leaf.users)
        if learns and not graph.boundaries(name):
            raise RuleError(
                f"block {name} has no floating-point output that leaves it, so it has nothing to learn from",
                module=name,
                remedy="choose coarser blocks, so that the block's output reaches a later one",
            )
