"""Local guesses: the gradient of a local loss as the direction along which the task loss is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.rules._heads import Head, HeadRule
from graphrewrite.passes.rules._local import hidden_blocks
from graphrewrite.passes.rules._perturb import trained_leaves
from graphrewrite.passes.rules._site import answer_of
from graphrewrite.passes.rules.local_loss import build_head
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Loss,
    LossTerm,
    NodeInfo,
    Role,
    State,
    Tangent,
    info,
    is_backward,
    spec_of,
    value,
)


@dataclass(frozen=True)
class LocalGuess(HeadRule):
    """The heads of a rule that learns along their gradients: they teach a direction, not the blocks."""

    head: Any = "pred"

    name = "forward_gradient"

    def make_head(self) -> Head:
        """The chosen head."""
        return build_head(self.head)


def guess(graph: JointGraph, guesser: LocalGuess) -> dict[str, dict[fx.Node, fx.Node]]:
    """Put heads on the hidden blocks and give the gradients of their losses: block -> parameter -> gradient.

    The task loss stays what the graph returns, the last block keeps its exact gradient, the heads learn from their own
    losses.
    """
    task = graph.outputs[Loss()]
    hidden = {block.name for block in hidden_blocks(graph, {answer_of(graph).block})}
    table = graph.table
    with graph.deferred():
        guesser.run(graph)
        graph.add_output(Loss(), task)
        for spec, node in graph.outputs.items():
            if isinstance(spec, LossTerm) and node is not task and node in table.seeds:
                # the direction must not hang on how the task loss is scaled
                like = NodeInfo(role=Role.SIGNAL, block=info(node).block, module=info(node).module, stage="forward")
                held = value(node)
                one = graph.emit(
                    torch.ops.aten.full.default, ([], 1.0), {"dtype": held.dtype, "device": held.device}, like=like
                )
                table.seeds[node] = [one]
        tangent = graph.loss_tangent(value(task).dtype)
        for leaf in graph.leaves:
            if isinstance(spec_of(leaf), State) and str(spec_of(leaf)).startswith("learned"):
                graph.map_gradient(leaf, lambda g, t: g * t.to(g.dtype), [tangent])
    found: dict[str, dict[fx.Node, fx.Node]] = {}
    for leaf in trained_leaves(graph):
        block, made = table.block_of(leaf), graph.cotangent(leaf)
        if block in hidden and made is not None:
            found.setdefault(block, {})[leaf] = made
    return found


def project(graph: JointGraph, groups: Sequence[dict[fx.Node, fx.Node]]) -> None:
    """Let the gradients of each group be (dL . v) v / |v|^2, v being the group's guesses."""
    loss = graph.outputs[Loss()]
    tangent = graph.loss_tangent(value(loss).dtype)
    like = NodeInfo(role=Role.TANGENT, block=LOSS_BLOCK, module=LOSS_BLOCK)

    def coefficient(slope: torch.Tensor, *guesses: torch.Tensor) -> torch.Tensor:
        square = sum(v.square().sum() for v in guesses)
        assert isinstance(square, torch.Tensor)
        return slope / square.clamp(min=torch.finfo(slope.dtype).tiny)

    with graph.deferred():
        for guesses in groups:
            slope = graph.push_forward(guesses)[loss]
            node = graph.splice(coefficient, [slope, *guesses.values()], like=like, whole=False)
            for leaf in guesses:
                graph.map_gradient(leaf, lambda v, c, t: v * (c * t).to(v.dtype), [node, tangent])
    _run_early(graph)


def _run_early(graph: JointGraph) -> None:
    """What does not hang on the cotangent of the loss runs in the forward: the guesses are read there."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if isinstance(spec_of(node), Tangent):
                late.add(node)
        elif any(source in late for source in node.all_input_nodes):
            late.add(node)
        elif is_backward(node):
            node.meta["gr"] = info(node).but(stage="forward")
