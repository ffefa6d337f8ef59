"""Counter-current learning: a label network runs against the model, and both learn where they meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from graphrewrite.passes.rules._boundary import feature_axis
from graphrewrite.passes.rules._forward_forward import known, masked_mean, refuse_silent_blocks
from graphrewrite.passes.rules._labels import checked_labels
from graphrewrite.passes.rules._local import (
    class_count,
    hidden_blocks,
    label_input,
    refuse_blocks_before,
    refuse_other_batches,
)
from torch import fx
from torch.nn import functional as F

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Loss, LossTerm, NodeInfo, Role, UserInput, fix, flat_inputs, info, is_float, value
from graphrewrite.graph.ops import aten
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule

ACTIVATIONS = frozenset(
    {
        aten.relu.default,
        aten.elu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.leaky_relu.default,
    }
)


@dataclass(frozen=True)
class CounterCurrent(Rule):
    """Cut the model between its blocks and let a mirrored network carry the label codes from the output to the input.

    With a_l the outputs of the blocks (a_0 the input) and b_L the one-hot codes of all classes, b_{l-1} = phi(V_l
    b_l). Nothing flows back through either chain: a_l and b_l are detached where the next one reads them. At every
    level l < L the activations of the batch and the signals of the classes meet: (a_l b_l^T)_{ic} shall be 1 where c
    is the class of sample i and 0 elsewhere. That loss trains block l and V_{l+1}; the last block learns by the task
    loss. The model's own forward is unchanged, and so is prediction.

    A block whose operators are linear maps, activations and dropout in a chain is mirrored: V_l has the shape of the
    transposed weights and phi is the block's own activation. For any other block the mirror is generated: one linear
    map from the features behind it to those before it, the same at all positions, and `activation`.

    Args:
        scale: s: the loss is 256 s / n times the mean square, n the number of features.
        normalise: Divide a and b by their norms, sample by sample and class by class: `"auto"`: for maps of channels
            and sequences; `"always"`, `"never"`.
        decorrelation: Weight of the two decorrelation terms: mean squares of the products of signals of different
            classes, and of activations of samples of different classes (0.5 in the paper's convolutional nets).
        margin: Samples whose largest error is below it have no part in the loss (0.1 in the paper's convolutional
            nets).
        activation: phi of generated mirrors.
        num_classes: Default: the last dimension of the model's first output.
    """

    scale: float = 0.5
    normalise: Literal["auto", "always", "never"] = "auto"
    decorrelation: float = 0.0
    margin: float = 0.0
    activation: Literal["elu", "relu", "tanh", "gelu", "identity"] = "elu"
    num_classes: int | None = None

    name = "counter_current"
    summary = "counter-current learning: a label network against the model, local losses where they meet"
    formula = "L_l = 256 s / n · mean((a_l b_lᵀ − [y_i = c])²),  b_{l−1} = φ(V_l b_l)"
    paper = "Kao and Hariharan, Counter-Current Learning: A Biologically Plausible Dual Network Approach, 2024"
    objective: ClassVar = "local"
    needs_loss = True
    learns_state = True

    def requires(self, graph: JointGraph) -> None:
        """One class per sample, and hidden blocks that have outputs."""
        known("normalise", self.normalise, ("auto", "always", "never"))
        known("activation", self.activation, ("elu", "relu", "tanh", "gelu", "identity"))
        y = label_input(graph)
        class_count(graph, self.num_classes)
        hidden = hidden_blocks(graph)
        refuse_blocks_before(graph, hidden, self.name)
        refuse_silent_blocks(graph, [b.name for b in hidden])
        refuse_other_batches([n for b in hidden for n in graph.boundaries(b.name)], y)

    def run(self, graph: JointGraph) -> PassResult:
        """Cut, build the label network from the top down, teach both where they meet."""
        classes = class_count(graph, self.num_classes)
        levels = [b for block in hidden_blocks(graph) for b in graph.boundaries(block.name)]
        task = graph.outputs[Loss()]
        with graph.deferred():
            graph.drop_backward()
            like = NodeInfo(role=Role.FORWARD, module="labels")
            y = graph.splice(lambda y: checked_labels(y, classes), [label_input(graph)], like=like)
            for boundary in levels:
                graph.cut(boundary)
            graph.remove_outputs(Loss, LossTerm)
            graph.add_loss(LossTerm("task"), task)
            graph.seed_loss(task)
            blocks = [*(info(b).block for b in levels), info(graph.model_outputs[0]).block]
            met: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
            signal: fx.Node | None = None
            for number, level in reversed(list(enumerate([_vector_input(graph), *levels]))):
                if level is None:
                    continue  # V_1 teaches nobody: without a vector to meet, it is left out
                signal = self._mirror(graph, blocks[number], number, level, signal, classes)
                met.setdefault(info(level).block or blocks[0], []).append((level, signal))
            for home, pairs in reversed(met.items()):
                self._teach(graph, home, pairs, y)
        return PassResult(graph, True)

    # --- the label network -----------------------------------------------------------------------------------------

    def _mirror(
        self, graph: JointGraph, block: str, number: int, level: fx.Node, above: fx.Node | None, classes: int
    ) -> fx.Node:
        """The signals at a level, (classes, features), from those behind the block above it (None: the codes)."""
        width = classes if above is None else fix(value(above).shape[1])
        chain = _chain(graph, block, level)
        act, shapes = _named(self.activation), [(width, _feature_count(level))]
        if chain is not None and (chain.shapes[-1][0], chain.shapes[0][1]) == shapes[0]:
            act, shapes = chain.activation or act, chain.shapes[::-1]
        weights = [
            graph.add_state(self.state_name(f"mirror.{number}.{i}"), (inputs, outputs), _fill(outputs), trainable=True)
            for i, (outputs, inputs) in enumerate(shapes)
        ]

        def signals(*inputs: torch.Tensor) -> torch.Tensor:
            codes = torch.eye(classes, dtype=inputs[0].dtype, device=inputs[0].device)
            b = codes if above is None else inputs[-1].detach()
            for weight in inputs[: len(weights)]:
                b = act(F.linear(b, weight))
            return b

        # in no block: the label network runs beside the model
        like = NodeInfo(role=Role.FORWARD, module=f"mirror.{block}")
        node: fx.Node = graph.splice(signals, [*weights, *([] if above is None else [above])], like=like)
        return node

    # --- where they meet -------------------------------------------------------------------------------------------

    def _teach(self, graph: JointGraph, home: str, met: list[tuple[fx.Node, fx.Node]], y: fx.Node) -> None:
        plans = [(feature_axis(level), value(level).dim() > 2) for level, _ in met]

        def loss(y: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
            total = None
            for i, (axis, spatial) in enumerate(plans):
                a, b = inputs[2 * i].to(inputs[2 * i + 1].dtype), inputs[2 * i + 1]
                if a.dim() > 2:
                    a = a.mean(tuple(d for d in range(1, a.dim()) if d != axis))
                unit = self.normalise == "always" or (self.normalise == "auto" and spatial)
                part = self._pairwise(a, b, y, unit)
                total = part if total is None else total + part
            assert total is not None
            return total

        graph.teach(home, loss, [y, *(node for pair in met for node in pair)])

    def _pairwise(self, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, unit: bool) -> torch.Tensor:
        """The loss of one level: a (batch, features), b (classes, features)."""
        factor = 256 * self.scale / a.shape[1]
        if unit:
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        wanted = (y.unsqueeze(1) == torch.arange(b.shape[0], device=y.device)).to(a.dtype)
        error = a @ b.t() - wanted
        counted = y >= 0
        if self.margin:
            counted = counted & (error.detach().abs().amax(1) >= self.margin)
        loss = factor * masked_mean(error.square().mean(1), counted)
        if self.decorrelation:
            other = 1 - torch.eye(b.shape[0], dtype=b.dtype, device=b.device)
            differ = (y.unsqueeze(1) != y).to(a.dtype)
            apart = ((b @ b.t()).square() * other).sum() / other.sum()
            spread = ((a @ a.t()).square() * differ).sum() / differ.sum().clamp(min=1)
            loss = loss + self.decorrelation * factor * (apart + spread)
        return loss


@dataclass(frozen=True)
class _Chain:
    """A block that is a chain of linear maps with one kind of activation.

    Attributes:
        shapes: (outputs, inputs) of its maps, in order.
        activation: Its activation; None: it has none.
    """

    shapes: list[tuple[int, int]]
    activation: Callable[[torch.Tensor], torch.Tensor] | None


def _chain(graph: JointGraph, block: str, level: fx.Node) -> _Chain | None:
    """The block as a chain that starts at the level before it, if it is one."""
    shapes: list[tuple[int, int]] = []
    activation = None
    current = level
    for node in graph.forward_nodes():
        if info(node).block != block or info(node).role is not Role.FORWARD:
            continue
        inputs = flat_inputs(node)
        if node.target is aten._to_copy.default:  # autocast's, of activations and of weights
            current = node if current in inputs else current
            continue
        if current not in inputs or not isinstance(value(node), torch.Tensor):
            return None
        if node.target is aten.linear.default and value(node).dim() == 2:
            outputs, width = value(inputs[1]).shape
            shapes.append((fix(outputs), fix(width)))
        elif node.target in ACTIVATIONS:
            activation = _apply(node)
        else:
            return None
        current = node
    return _Chain(shapes, activation) if shapes else None


def _apply(node: fx.Node) -> Callable[[torch.Tensor], torch.Tensor]:
    """The operator of a node, with its constants, on another value."""
    target: Any = node.target
    return lambda b: target(b, *node.args[1:], **node.kwargs)


def _vector_input(graph: JointGraph) -> fx.Node | None:
    """The model's first input, if it is one vector per sample."""
    first = next((n for s, n in graph.inputs.items() if isinstance(s, UserInput)), None)
    return first if first is not None and is_float(first) and value(first).dim() == 2 else None


def _feature_count(level: fx.Node) -> int:
    return fix(value(level).shape[feature_axis(level)])


def _named(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "elu": F.elu,
        "relu": F.relu,
        "tanh": torch.tanh,
        "gelu": F.gelu,
        "identity": lambda b: b,
    }
    return known[name]


def _fill(fan_in: int) -> Callable[[torch.Tensor, torch.Generator], torch.Tensor]:
    bound = 1 / math.sqrt(fan_in)
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)
