"""Equilibrium propagation: the network settles freely, then nudged; weights learn from the difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.rules._energy import Layer, read_by, settled_blocks, warn_about_distance
from graphrewrite.passes.rules._replay import Replay, refuse_empty_batch, task_loss, trained_leaves
from graphrewrite.passes.rules._residual import ADDITIONS
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.loop import labelled
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Loss,
    LossTerm,
    NodeInfo,
    Role,
    UserOutput,
    flat_inputs,
    info,
    is_float,
    value,
)
from graphrewrite.graph.ops import ACTIVATIONS, MATMULS, call_operator
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import FINER_BLOCKS, Rule

FREE = NodeInfo(role=Role.SIGNAL, block=LOSS_BLOCK, stage="forward")


PRODUCTS = MATMULS | {torch.ops.aten.mul.Tensor}


@dataclass(frozen=True)
class EquilibriumPropagation(Rule):
    """Read the model as a network with symmetric connections and let it settle, freely and nudged both ways.

    Each hidden block is s_l = act(a_l(s_{l-1})), a_l being all of it in front of its last activation. With

        Phi(s) = sum_l <s_l, a_l(s_{l-1})> - beta L(out(s)),    s_l <- act(dPhi/ds_l)

    dPhi/ds_l is a_l(s_{l-1}), what the block receives from below, plus the transposed derivative of the next block
    applied to that one's state, what it receives from above (a max-pool becomes its matching un-pool). What follows a
    block's last activation (pooling, dropout, a normalisation) counts as the beginning of the next one, and so does a
    block that ends in no activation, a convolution in front of its normalisation, say; `explain` names those. What
    lies behind all states is a read-out outside of the dynamics. After `free_steps` the states are s_0; from there
    `nudged_steps` with +beta and -beta lead to s_+ and s_-, and

        G = -(dPhi/dw(s_+) - dPhi/dw(s_-)) / 2 beta

    is the gradient of L(out(s_0)), with an error of order beta^2; with `symmetric` off it is taken between s_+ and
    s_0, with an error of order beta. Each phase is one loop of the graph.

    What is trained is the settled network: `compiled.predict` lets it settle, the loss that is returned is its loss,
    and `compiled(x)` is the model's plain forward pass. `losses["unsettled"]` is the largest change that one more
    free step would make: a network with strong connections or unbounded activations may not converge.

    Args:
        beta: Strength of the nudge, per sample.
        free_steps: Steps of the free phase, from the forward pass's activations.
        nudged_steps: Steps of each nudged phase.
        symmetric: Nudge both ways.
    """

    beta: float = 0.1
    free_steps: int = 30
    nudged_steps: int = 10
    symmetric: bool = True

    name = "equilibrium_propagation"
    summary = "equilibrium propagation: the difference between two nudged equilibria"
    formula = "s ← act(∂Φ/∂s),  Φ = Σ ⟨s_l, a_l(s_{l−1})⟩ − β L;  G = −(∂Φ/∂w(s₊) − ∂Φ/∂w(s₋)) / 2β"
    paper = (
        "Scellier, Bengio, Equilibrium propagation, 2017; Laborieux et al., Scaling equilibrium propagation to deep "
        "ConvNets by drastically reducing its gradient estimator bias, 2021"
    )
    needs_loss = True
    changes_forward = True

    def requires(self, graph: JointGraph) -> None:
        """Options that make sense, blocks that end in an activation, and no other rule beside this one."""
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise RuleError(f"beta={self.beta:g} is no nudge", remedy="use beta > 0")
        if self.free_steps < 1 or self.nudged_steps < 1:
            raise RuleError(
                f"both phases need steps, got free_steps={self.free_steps}, nudged_steps={self.nudged_steps}"
            )
        if not graph.has_loss:
            raise RuleError("equilibrium_propagation needs the loss", remedy="train with compiled.loss(x, y)")
        refuse_empty_batch(graph, self.name)
        mine = {block.name for block in graph.rule_blocks()}
        other = next((block for block in graph.blocks if block.name not in mine), None)
        if other is not None:
            raise RuleError(
                f"the whole network settles: block {other.name} cannot learn by {other.rule} beside it",
                module=other.name,
                remedy="let equilibrium_propagation train every block",
            )
        _states(graph, lambda reason, node: self.fail(graph, reason, node))

    def run(self, graph: JointGraph) -> PassResult:
        """A free phase, two nudged ones, and the gradients of their difference."""
        network = _Network(self, graph, task_loss(graph))
        leaves = trained_leaves(graph)
        read = read_by(graph, list(network.states), self.name)
        warn_about_distance(self.name, read, self.nudged_steps, "nudged_steps")
        graph.forward_may_read_cotangents = True
        with graph.deferred():
            graph.drop_backward()
            free = network.settle(list(network.states), self.free_steps, 0.0)
            loss = network.read_out(free, [task_loss(graph)], NodeInfo(role=Role.LOSS, block=LOSS_BLOCK))[0]
            ahead = network.settle(free, self.nudged_steps, self.beta)
            behind = network.settle(free, self.nudged_steps, -self.beta) if self.symmetric else free
            unsettled = network.unsettled(free)
            gradients = network.learn(ahead, behind, leaves)
            graph.remove_outputs(Loss, LossTerm)
            graph.add_loss(LossTerm("task"), loss)
            graph.add_output(LossTerm("unsettled"), unsettled)
            for leaf, gradient in gradients.items():
                tangent = graph.loss_tangent(value(leaf).dtype)
                graph.redirect(leaf, lambda g, t: g * t, [gradient, tangent])
        return PassResult(graph, True)

    def rewrite_forward(self, graph: JointGraph) -> None:
        """The outputs of the settled network."""
        graph.forward_may_read_cotangents = True
        outputs = {s: n for s, n in graph.outputs.items() if isinstance(s, UserOutput)}
        network = _Network(self, graph, None)
        free = network.settle(list(network.states), self.free_steps, 0.0)
        made = network.read_out(free, list(outputs.values()), NodeInfo(role=Role.FORWARD, block=graph.blocks[-1].name))
        for spec, node in zip(outputs, made, strict=True):
            graph.add_output(spec, node)


@dataclass(frozen=True, eq=False)
class _State:
    """The last activation of a block: its value is the state, its argument what drives it."""

    node: fx.Node
    argument: fx.Node

    def activate(self, drive: torch.Tensor) -> torch.Tensor:
        """The activation of a drive."""
        rest = self.node.args[1:]
        with labelled(info(self.node).but(role=Role.SIGNAL, copy="settle", mirrors=None, stage="")):
            made: torch.Tensor = call_operator(self.node.target, (drive, *rest), self.node.kwargs)  # type: ignore[arg-type]
        return made


def _states(graph: JointGraph, fail: Callable[[str, fx.Node], None] | None = None) -> list[_State]:
    """One for each hidden block that ends in an activation; the others belong to what drives the next state."""
    found: dict[fx.Node, _State] = {}
    reasons: list[tuple[str, fx.Node]] = []
    blocks = settled_blocks(graph)
    if not blocks:
        raise RuleError(
            "equilibrium_propagation needs a block before the one that computes the output",
            remedy=FINER_BLOCKS,
        )
    for block, boundaries in blocks.items():
        for boundary in boundaries:
            node = boundary
            while node.target not in ACTIVATIONS and (before := _behind(graph, node)) is not None:
                node = before
            if node.target in ACTIVATIONS and len(flat_inputs(node)) == 1:
                _refuse_residual_sum(graph, block, flat_inputs(node)[0])
                _refuse_products(graph, block)
                found[node] = _State(node, flat_inputs(node)[0])
            else:
                reasons.append((f"block {block} ends in no activation but in {node.target}: it has no state", node))
    if fail is not None:
        for reason, node in reasons:
            fail(reason, node)
    if not found:
        reason, node = reasons[0]
        raise RuleError(
            f"no block ends in an activation, so that nothing could settle: {reason}",
            node=node.name,
            module=info(node).module,
            remedy="choose blocks that end in an activation (pooling, dropout, a normalisation may follow it), or use "
            "predictive_coding, whose states can be any activations",
        )
    return list(found.values())


def _moving(graph: JointGraph, operator: fx.Node) -> list[fx.Node]:
    """What an operator reads that changes while the states settle."""
    table = graph.table
    return [n for n in flat_inputs(operator) if is_float(n) and table.requires_grad(n) and not table.is_weightlike(n)]


def _refuse_products(graph: JointGraph, block: str) -> None:
    """Attention and gates couple states with a strength that grows with the states: the energy has no lower bound."""
    for node in graph.forward_nodes():
        if info(node).block == block and node.target in PRODUCTS and len(_moving(graph, node)) > 1:
            raise RuleError(
                f"block {block} multiplies what depends on the states with one another: such states need not settle",
                node=node.name,
                module=info(node).module,
                remedy="use predictive_coding, which needs no symmetric connections",
            )


def _refuse_residual_sum(graph: JointGraph, block: str, argument: fx.Node) -> None:
    """A skip couples two states with strength 1: they drive each other up without end."""
    if argument.target in ADDITIONS and len(_moving(graph, argument)) > 1:
        raise RuleError(
            f"block {block} adds a skip in front of its activation: states coupled with strength 1 do not settle",
            node=argument.name,
            module=info(argument).module,
            remedy="use predictive_coding, which needs no symmetric connections",
        )


def _behind(graph: JointGraph, node: fx.Node) -> fx.Node | None:
    """The one activation of the same block that an operator reads; None if there are more, or it comes from outside."""
    read = _moving(graph, node)
    if node.op != "call_function" or len(read) != 1 or read[0].op != "call_function":
        return None
    return read[0] if info(read[0]).block == info(node).block else None


class _Network:
    """The model as Phi: drives between states, and a read-out."""

    def __init__(self, rule: EquilibriumPropagation, graph: JointGraph, loss: fx.Node | None) -> None:
        self.rule, self.graph, self.loss = rule, graph, loss
        self.states = {state.node: state for state in _states(graph)}
        self.layers = self._layers(())

    def _layers(self, leaves: Sequence[fx.Node]) -> list[tuple[Layer, fx.Node | None]]:
        """What drives each state, and the loss, for which there is None."""
        varying, name = [*self.states, *leaves], self.rule.name
        layers: list[tuple[Layer, fx.Node | None]] = []
        for node, state in self.states.items():
            layers.append(
                (Layer(info(node).block, [state.argument], Replay(self.graph, [state.argument], varying, name)), node)
            )
        if self.loss is not None:
            layers.append((Layer(LOSS_BLOCK, [self.loss], Replay(self.graph, [self.loss], varying, name)), None))
        return layers

    def settle(self, start: Sequence[fx.Node], steps: int, beta: float) -> list[fx.Node]:
        """A phase: a loop over synchronous steps from some values of the states."""
        layers = [(layer, end) for layer, end in self.layers if end is not None or beta]
        inputs = list(dict.fromkeys(n for layer, _ in layers for n in layer.replay.inputs))
        count = len(self.states)

        def body(*values: torch.Tensor) -> list[torch.Tensor]:
            held = dict(zip(self.states, values[:count], strict=True))
            given = dict(zip(inputs, values[count:], strict=True))
            return self._step(held, given, layers, beta)

        return self.graph.repeat(body, start, steps, inputs=inputs, like=FREE)

    def _step(
        self,
        held: Mapping[fx.Node, torch.Tensor],
        given: Mapping[Any, torch.Tensor],
        layers: Sequence[tuple[Layer, fx.Node | None]],
        beta: float,
    ) -> list[torch.Tensor]:
        drives = {node: torch.zeros_like(v) for node, v in held.items()}
        for layer, end in layers:
            made, back = layer.pull(held, given, lambda made, end=end: [self._sent(held, made[0], end, beta)])  # type: ignore[misc]
            if end is not None:
                drives[end] = drives[end] + made[0]
            drives |= {node: drives[node] + b for node, b in back.items()}
        return [state.activate(drives[node]).to(held[node].dtype) for node, state in self.states.items()]

    @staticmethod
    def _sent(
        held: Mapping[fx.Node, torch.Tensor], made: torch.Tensor, end: fx.Node | None, beta: float
    ) -> torch.Tensor:
        """The derivative of Phi by what a layer made: the state it drives, or -beta for a loss per sample."""
        if end is not None:
            return held[end]
        return torch.ones_like(made) * (-beta * next(iter(held.values())).shape[0])

    def read_out(self, states: Sequence[fx.Node], outputs: Sequence[fx.Node], like: NodeInfo) -> list[fx.Node]:
        """Values of the model at some states."""
        replay = Replay(self.graph, outputs, self.states, self.rule.name)
        count = len(self.states)

        def read(*values: torch.Tensor) -> list[torch.Tensor]:
            held = dict(zip(self.states, values[:count], strict=True))
            return replay(held, values[count:], copy="settle")

        made: list[fx.Node] = self.graph.splice(read, [*states, *replay.inputs], like=like, whole=False)
        return made

    def unsettled(self, states: Sequence[fx.Node]) -> fx.Node:
        """How far one more free step would go."""
        after = self.settle(states, 1, 0.0)

        def largest(*values: torch.Tensor) -> torch.Tensor:
            half = len(values) // 2
            gaps = [(a - b).abs().max() for a, b in zip(values[:half], values[half:], strict=True)]
            return torch.stack(gaps).max()

        made: fx.Node = self.graph.splice(largest, [*states, *after], like=FREE, whole=False)
        return made

    def learn(
        self, ahead: Sequence[fx.Node], behind: Sequence[fx.Node], leaves: Sequence[fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """-(dPhi/dw(ahead) - dPhi/dw(behind)) / (their distance in beta), layer by layer."""
        found: dict[fx.Node, list[fx.Node]] = {leaf: [] for leaf in leaves}
        for layer, end in self._layers(leaves):
            wanted = [leaf for leaf in leaves if leaf in layer.replay.reads]
            if wanted:
                made = self._difference(layer, end, wanted, [*ahead, *behind])
                for leaf, node in zip(wanted, made, strict=True):
                    found[leaf].append(node)

        def total(*terms: torch.Tensor) -> torch.Tensor:
            return torch.stack(terms).sum(0)

        return {
            leaf: terms[0] if len(terms) == 1 else self.graph.splice(total, terms, like=info(terms[0]), whole=False)
            for leaf, terms in found.items()
            if terms
        }

    def _difference(
        self, layer: Layer, end: fx.Node | None, wanted: Sequence[fx.Node], ends: Sequence[fx.Node]
    ) -> list[fx.Node]:
        beta, symmetric, count = self.rule.beta, self.rule.symmetric, len(self.states)
        inputs = layer.replay.inputs

        def derive(*values: torch.Tensor) -> list[torch.Tensor]:
            weights = dict(zip(wanted, values[2 * count :], strict=False))
            given = dict(zip(inputs, values[2 * count + len(wanted) :], strict=True))
            slopes = []
            for sign, states in ((1, values[:count]), (-1, values[count : 2 * count])):
                held = dict(zip(self.states, states, strict=True))
                nudge = beta * sign if symmetric or sign > 0 else 0.0
                _, back = layer.pull(
                    held | weights,
                    given,
                    lambda made, held=held, nudge=nudge: [self._sent(held, made[0], end, nudge)],  # type: ignore[misc]
                    wrt=wanted,
                )
                slopes.append(back)
            scale = (2 if symmetric else 1) * beta * values[0].shape[0]
            return [(slopes[1][leaf] - slopes[0][leaf]) / scale for leaf in wanted]

        like = NodeInfo(role=Role.GRADIENT, block=layer.block, module=layer.block)
        made: list[fx.Node] = self.graph.splice(derive, [*ends, *wanted, *inputs], like=like, whole=False)
        return made
