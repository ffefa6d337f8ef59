"""Parts of the rules in which activations are free: blocks as functions between states, and their derivatives."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.rules._replay import Replay, run_node, task_loss
from torch import fx
from torch.utils import _pytree as pytree

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.loop import labelled
from graphrewrite.graph.nodes import LOSS_BLOCK, NodeInfo, Role, info


def settled_blocks(graph: JointGraph) -> dict[str, list[fx.Node]]:
    """The running rule's blocks whose outputs other blocks read, with these outputs: the states.

    They are those of the pass that the task loss reads, which a local rule in front may have put in the first's place.
    """
    label = info(task_loss(graph)).copy if graph.has_loss else ""
    found: dict[str, list[fx.Node]] = {}
    for block in graph.rule_blocks():
        for boundary in graph.boundaries(block.name, copy=label):
            if graph.crossing(boundary, loss=False):
                found.setdefault(block.name, []).append(boundary)
    return found


def read_by(graph: JointGraph, states: Sequence[fx.Node], rule: str) -> dict[fx.Node, set[fx.Node]]:
    """What each state, in the order of the forward, is predicted from; for the loss, what it reads."""
    ends = [*sorted(states), task_loss(graph)]
    return {end: Replay(graph, [end], states, rule).reads for end in ends}


def warn_about_distance(
    rule: str, read: Mapping[fx.Node, set[fx.Node]], steps: int, option: str, *, late: int = 0
) -> None:
    """An error moves by one state per step: with too few of them, blocks far from the loss learn nothing."""
    away: dict[fx.Node, int] = {}
    for end in reversed(list(read)):
        for state in read[end]:
            away[state] = min(away.get(end, 0) + 1, away.get(state, len(read)))
    near = {info(state).block for state, distance in away.items() if distance + late <= steps}
    far = [info(end).block for end in read if end in away and info(end).block not in near]
    if far:
        warnings.warn(
            f"{rule}: an error moves by one block per step; {option}={steps} does not bring it to "
            f"{', '.join(dict.fromkeys(far))}, which will not learn. All learn from "
            f"{option}={max(away.values()) + late} on",
            stacklevel=2,
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """One block as a function of the states (and weights) it reads.

    Attributes:
        block: Its name; that of the loss for what lies behind all states.
        outputs: The states it predicts, or the loss.
        replay: How it is run.
    """

    block: str
    outputs: list[fx.Node]
    replay: Replay

    def pull(
        self,
        held: Mapping[fx.Node, torch.Tensor],
        given: Mapping[Any, torch.Tensor],
        cotangents: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
        *,
        wrt: Sequence[fx.Node] | None = None,
        role: Role | None = None,
    ) -> tuple[list[torch.Tensor], dict[fx.Node, torch.Tensor]]:
        """Run it and its derivative.

        Args:
            held: Values of states and weights.
            given: Values of `replay.inputs`.
            cotangents: Of the outputs, as a function of them.
            wrt: What cotangents are wanted of; default: all that it reads.
            role: Of the operators of its forward.

        Returns:
            The outputs, and a cotangent for each of `wrt`.
        """
        run = _Segments(self, held, given, role)
        wanted = [node for node in held if node in self.replay.reads and (wrt is None or node in wrt)]
        with torch.enable_grad():
            made = run.forward(wanted)
            found = run.backward(made, cotangents(made), wanted) if wanted else {}
        return made, found


_Segment = tuple[int, str]


class _Segments:
    """A layer run in segments, each on leaves of its own, so that every derivative belongs to one block.

    A segment is as much of a block as lies equally many blocks behind the wanted values. Blocks as such have no order:
    the size of an input that the loss reads comes before what the head computes, and a block may read what another has
    made of its own values. Segments have one, along which cotangents go back.
    """

    def __init__(
        self,
        layer: Layer,
        held: Mapping[fx.Node, torch.Tensor],
        given: Mapping[Any, torch.Tensor],
        role: Role | None,
    ) -> None:
        self.layer, self.role = layer, role
        self.values: dict[fx.Node, Any] = {n: given[n] for n in layer.replay.inputs}
        self.held = held
        self.made: dict[fx.Node, Any] = dict(self.values)
        self.segment_of: dict[fx.Node, _Segment] = {}
        self.leaves: dict[_Segment, dict[fx.Node, torch.Tensor]] = {}

    def forward(self, wanted: Sequence[fx.Node]) -> list[torch.Tensor]:
        """The outputs, detached."""
        active = set(wanted)
        for node in self.layer.replay.nodes:
            segment = self._segment(node)
            read = functools.partial(self._read, segment=segment, active=active)
            result = run_node(node, read, copy="settle", role=self.role)
            self.made[node] = result
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(result)):
                active.add(node)
                self.segment_of[node] = segment
        return [self.made[node].detach() for node in self.layer.outputs]

    def _segment(self, node: fx.Node) -> _Segment:
        """The segment of an operator, told by those of what it reads; parts of a tuple belong to what made it."""
        read = [n for n in node.all_input_nodes if n in self.segment_of and n not in self.held]
        for made in read:
            if not isinstance(self.made[made], torch.Tensor):
                return self.segment_of[made]
        block = info(node).block
        return max((depth + (own != block) for depth, own in map(self.segment_of.__getitem__, read)), default=0), block

    def _read(self, node: fx.Node, segment: _Segment, active: set[fx.Node]) -> Any:
        held = node in self.held
        value = self.held[node] if held else self.made[node]
        if not isinstance(value, torch.Tensor) or (not held and self.segment_of.get(node) == segment):
            return value
        if node not in active or not (value.is_floating_point() or value.is_complex()):
            return value.detach()
        leaves = self.leaves.setdefault(segment, {})
        if node not in leaves:
            leaves[node] = value.detach().requires_grad_()
        return leaves[node]

    def backward(
        self, made: Sequence[torch.Tensor], sent: Sequence[torch.Tensor], wanted: Sequence[fx.Node]
    ) -> dict[fx.Node, torch.Tensor]:
        """A cotangent for each wanted value."""
        arrived: dict[fx.Node, torch.Tensor] = {}
        found: dict[fx.Node, torch.Tensor] = {}
        for node, cotangent, out in zip(self.layer.outputs, sent, made, strict=True):
            arrived[node] = cotangent.to(out.dtype)
        for segment in sorted(self.leaves, reverse=True):
            leaves, block = self.leaves[segment], segment[1]
            ends = [n for n in arrived if self.segment_of.get(n) == segment]
            if not ends:
                continue
            with labelled(NodeInfo(role=Role.COTANGENT, block=block, module=block)):
                grads: Sequence[torch.Tensor | None] = torch.autograd.grad(
                    [self.made[n] for n in ends],
                    list(leaves.values()),
                    [arrived[n] for n in ends],
                    allow_unused=True,
                )
                for node, grad in zip(leaves, grads, strict=True):
                    if grad is None:
                        continue
                    sums = found if node in self.held else arrived
                    sums[node] = sums[node] + grad if node in sums else grad
        with labelled(NodeInfo(role=Role.COTANGENT, block=self.layer.block, module=self.layer.block)):
            return {n: found[n] if n in found else torch.zeros_like(self.held[n]) for n in wanted}


def layers_of(
    graph: JointGraph, states: Sequence[fx.Node], leaves: Sequence[fx.Node], rule: str
) -> tuple[list[Layer], Layer]:
    """The blocks that predict states, in order, and what lies between the states and the loss.

    Args:
        graph: The graph.
        states: Free activations.
        leaves: Weights that are arguments, too.
        rule: Name for messages.
    """
    varying = [*states, *leaves]
    by_block: dict[str, list[fx.Node]] = {}
    for state in states:
        by_block.setdefault(info(state).block, []).append(state)
    layers = [Layer(block, own, Replay(graph, own, varying, rule)) for block, own in by_block.items()]
    loss = task_loss(graph)
    return layers, Layer(LOSS_BLOCK, [loss], Replay(graph, [loss], varying, rule))
