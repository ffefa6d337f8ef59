"""Common parts of rules that run the model a second time, on an input that the output error changed.

What a layer learns from is how its own activity differs between the two passes. No cotangent crosses a block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from graphrewrite.passes.rules._boundary import feature_axis
from graphrewrite.passes.rules._feedback import hidden_boundaries
from graphrewrite.passes.rules._forward_forward import known
from graphrewrite.passes.rules._local import refuse_blocks_before
from graphrewrite.passes.rules._task import Task
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import is_view
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Loss,
    UserInput,
    flat_inputs,
    info,
    is_backward,
    is_float,
    same_size,
    value,
)
from graphrewrite.graph.ops import ACTIVATIONS, POOLS, is_pointwise, is_random
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import FINER_BLOCKS, Rule

aten = torch.ops.aten

_POOLS = POOLS | {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.clone.default,
}
_SIZE_ONLY = {
    aten.bernoulli.p,
    aten.rand.default,
    aten.randn.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint.default,
    aten.randint.low,
    aten.randint_like.default,
    aten.randperm.default,
}
"""Random operators whose result hangs on the size of their input alone."""

Pass = Literal["clean", "modulated"]


@dataclass(frozen=True)
class SecondPass(Rule):
    """Cut the blocks from each other, run a second pass, and teach each block by the difference of its activity.

    Args:
        presynaptic: Which pass the weight gradients read their input from.
    """

    presynaptic: Pass = "modulated"

    needs_loss: ClassVar[bool] = True

    @abstractmethod
    def modulated(self, graph: JointGraph, x: fx.Node, task: Task) -> fx.Node:
        """The input of the second pass; all its nodes have the label `self.name` (`NodeInfo.copy`)."""

    def requires(self, graph: JointGraph) -> None:
        """A loss over one output, a floating-point input, and a hidden block."""
        known("presynaptic", self.presynaptic, ("clean", "modulated"))
        task = Task.of(graph, self.name)
        modulated_input(graph, task, self.name)
        ends = hidden_boundaries(graph)
        if not ends:
            raise RuleError(
                f"{self.name} needs at least one block before the one that computes the output",
                remedy=FINER_BLOCKS,
            )
        refuse_blocks_before(graph, graph.rule_blocks(), self.name)

    def run(self, graph: JointGraph) -> PassResult:
        """Two passes; each block's own derivative starts from the difference between them."""
        task = Task.of(graph, self.name)
        x = modulated_input(graph, task, self.name)
        ends = hidden_boundaries(graph)
        own = {block.name for block in graph.rule_blocks()}
        # the second pass starts from an error
        graph.forward_may_read_cotangents = True
        with graph.deferred():
            new = self.modulated(graph, x, task)
            copies = graph.clone_forward({x: new, **same_draws(graph, self.name)}, self.name)
            later = self.presynaptic == "modulated"
            if later and info(task.answer).block in own:
                graph.drop_backward()
                self.seed_last(graph, task, copies)
            places: dict[tuple[fx.Node, fx.Node], None] = {}
            for boundary, _ in ends:
                for one in (boundary, copies.get(boundary, boundary)):
                    graph.cut(one, graph.crossing(one, loss=False))
                if boundary in copies:
                    places[activity(graph, boundary)] = None
            share = task.share_node(graph)
            for start, end in places:
                at = copies[start] if later else start
                readers = [u for u in at.users if u.op == "call_function" and not is_backward(u)]
                signal = _difference(_positions(end, task.answer))
                graph.redirect(at, signal, [end, copies[end], share, task.answer], consumers=readers)
        return PassResult(graph, True)

    def seed_last(self, graph: JointGraph, task: Task, copies: dict[fx.Node, fx.Node]) -> None:
        """Let the last block learn from the loss of the modulated pass."""
        del task
        graph.seed_loss(copies[graph.outputs[Loss()]])


def _difference(positions: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[..., torch.Tensor]:
    """(h - h'), as a mean over samples and positions."""

    def signal(first: torch.Tensor, second: torch.Tensor, share: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        share = (share / positions(first, answer)).to(first.dtype)
        return (first - second) * share

    return signal


def _positions(activity: fx.Node, answer: fx.Node) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """How many positions of an activity stand for one row of the answer."""
    h, a, axis = value(activity), value(answer), feature_axis(activity)
    if h.dim() == 2 and a.dim() == 2 and same_size(h.shape[0], a.shape[0]):
        return lambda h, a: 1

    def count(h: torch.Tensor, a: torch.Tensor) -> Any:
        rows = a.numel() // a.shape[-1] if a.dim() > 1 else a.shape[0]
        return h.numel() / (h.shape[axis] * rows)

    return count


def modulated_input(graph: JointGraph, task: Task, rule: str) -> fx.Node:
    """The first floating-point input of the model that shares its batch with the answer."""
    inputs = [n for s, n in graph.inputs.items() if isinstance(s, UserInput)]
    for node in inputs:
        if is_float(node) and value(node).dim() > 1 and same_size(value(node).shape[0], value(task.answer).shape[0]):
            return node
    kinds = ", ".join(str(value(n).dtype) for n in inputs if isinstance(value(n), torch.Tensor)) or "none"
    raise RuleError(
        f"{rule} adds the projected error to a floating-point input with the answer's batch, the model's inputs are: "
        f"{kinds}",
        remedy="feed the embedding's output as input, or use another rule",
    )


def same_draws(graph: JointGraph, rule: str) -> dict[fx.Node, fx.Node]:
    """Random values that both passes read (dropout masks), as a substitution for `clone_forward`.

    Raises:
        RuleError: An operator draws numbers that hang on the values it reads.
    """
    shared: dict[fx.Node, fx.Node] = {}
    for node in graph.forward_nodes():
        if info(node).copy or not is_random(node) or info(node).block == LOSS_BLOCK:
            continue
        if node.target not in _SIZE_ONLY:
            raise RuleError(
                f"{rule} runs the model twice with the same random numbers; {node.target} draws them as a function of "
                "the values it reads",
                node=node.name,
                module=info(node).module,
                source=info(node).source,
                remedy="use nn.Dropout or noise that hangs on sizes alone, or set its probability to 0",
            )
        shared[node] = node
    return shared


def activity(graph: JointGraph, boundary: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The last non-linearity before a boundary: what it reads, and what comes out of it (dropout included).

    Pooling and views behind it are left out. Without one, both are the boundary itself.
    """
    table, block = graph.table, info(boundary).block

    def source(node: fx.Node) -> fx.Node | None:
        """The one activation of the same block that an operator reads."""
        found = [n for n in flat_inputs(node) if is_float(n) and table.requires_grad(n)]
        if len(found) != 1 or info(found[0]).block != block or found[0].op != "call_function":
            return None
        return None if table.is_weightlike(found[0]) else found[0]

    path = [boundary]
    while (path[-1].target in _POOLS or is_view(path[-1]) or is_pointwise(path[-1])) and (
        before := source(path[-1])
    ) is not None:
        path.append(before)
    at = next((i for i, node in enumerate(path[:-1]) if node.target in ACTIVATIONS), None)
    if at is None:
        return boundary, boundary
    end = at
    while end > 0 and is_pointwise(path[end - 1]) and _same_shape(path[end - 1], path[at]):
        end -= 1
    return path[at + 1], path[end]


def _same_shape(node: fx.Node, other: fx.Node) -> bool:
    return tuple(map(str, value(node).shape)) == tuple(map(str, value(other).shape))
