"""Difference target propagation: targets instead of errors, carried down by learned approximate inverses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.rules._boundary import names_of, sample_width
from graphrewrite.passes.rules._energy import settled_blocks
from graphrewrite.passes.rules._feedback import fill_feedback, output_errors
from graphrewrite.passes.rules._replay import Replay
from torch import fx

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import NodeInfo, Role, StateUpdate, ancestors, hint, info, same_size, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import FINER_BLOCKS, Rule

Activation = Literal["linear", "tanh"]


@dataclass(frozen=True)
class _Link:
    """A block's way back: from its output to an activation that it reads."""

    name: str
    source: fx.Node
    output: fx.Node
    block: str


@dataclass(frozen=True)
class TargetPropagation(Rule):
    """Give every hidden block a target that a learned inverse of the block behind makes of that one's target.

    The output's target is t_L = z_L - beta dL/dz_L, per sample. A block f that reads h and gives y hands down

        t_h = h + G(t_y) - G(y),    G(y) = act(y B)   on flattened samples,

    and the block before learns from 1/2 |h - t_h|^2 / beta by its own exact derivative. Targets that come from several
    blocks add their differences. The output block learns from the loss itself. With `activation=linear` and B the
    transposed Jacobian this is backpropagation.

    B is learned by the local difference reconstruction loss (L-DRL), `iterations` steps of gradient descent on

        -2 <xi, G(f(h + xi)) - G(f(h))> + |G(y + zeta) - G(y)|^2,    xi, zeta ~ noise N(0, I),

    in a loop before the targets are made; for a linear G its minimum is the mean transposed Jacobian. No weight of the
    model is read on the way back. B belongs to the rule's state and is saved with it.

    Args:
        beta: Distance of the targets.
        activation: Of G: `"linear"` or `"tanh"`.
        iterations: Steps of L-DRL in every training step.
        rate: Learning rate of these steps, for a loss divided by noise^2.
        noise: See above.
        scale: B starts uniform in [-scale, scale) / sqrt(width of y).
    """

    beta: float = 0.7
    activation: Activation = "linear"
    iterations: int = 5
    rate: float = 0.05
    noise: float = 0.1
    scale: float = 1.0

    name = "target_propagation"
    summary = "difference target propagation: targets through learned inverses (L-DRL)"
    formula = "t_{l−1} = h_{l−1} + G(t_l) − G(h_l);  δ_l = (h_l − t_l)/β"
    paper = (
        "Lee et al., Difference target propagation, 2015; Ernoult et al., Towards scaling difference target "
        "propagation by learning backprop targets, 2022"
    )
    needs_loss = True

    def requires(self, graph: JointGraph) -> None:
        """Options that make sense, and a hidden block."""
        if not (self.beta > 0 and self.noise > 0 and math.isfinite(self.beta)):
            raise RuleError(f"target_propagation needs beta > 0 and noise > 0, got {self.beta:g} and {self.noise:g}")
        if self.activation not in ("linear", "tanh"):
            raise RuleError(f"activation={self.activation!r} is unknown", remedy="use 'linear' or 'tanh'")
        if self.iterations < 0 or not self.rate > 0:
            raise RuleError(f"iterations={self.iterations} with rate={self.rate:g} is no way to learn an inverse")
        if not graph.has_loss:
            raise RuleError("target_propagation needs the loss", remedy="train with compiled.loss(x, y)")
        if not settled_blocks(graph):
            raise RuleError(
                "target_propagation needs a block before the one that computes the output: there is no target to carry",
                remedy=FINER_BLOCKS,
            )

    def run(self, graph: JointGraph) -> PassResult:
        """Learn the inverses, then redirect every hidden boundary, the last one first."""
        states = [boundary for boundaries in settled_blocks(graph).values() for boundary in boundaries]
        names = dict(zip(states, names_of(states), strict=True))
        rank = {node: i for i, node in enumerate(graph.nodes)}
        differences: dict[fx.Node, fx.Node] = {}
        arrived = self._at_the_outputs(graph)
        for state in sorted(states, key=rank.__getitem__, reverse=True):
            links = self._links(graph, state, names[state])
            below = []
            for link in links:
                above = differences.get(link.output) or arrived.get(link.output)
                if above is None:
                    continue
                inverse = self._learn(graph, link)
                below.append(self._carry(graph, link, inverse, above))
            if not below:
                raise RuleError(
                    f"no target reaches block {info(state).block}: what reads it has neither a target nor an output",
                    node=state.name,
                    module=info(state).module,
                    remedy="choose blocks in which every hidden one leads to the output",
                )
            differences[state] = self._sum(graph, below, state)
        with graph.deferred():
            for state, difference in differences.items():
                tangent = graph.loss_tangent(value(state).dtype)
                graph.redirect(
                    state,
                    lambda d, t: d * t / (self.beta * d.shape[0]),
                    [difference, tangent],
                    consumers=graph.crossing(state, loss=False),
                )
        return PassResult(graph, True)

    def _at_the_outputs(self, graph: JointGraph) -> dict[fx.Node, fx.Node]:
        """Beta times the per-sample error of each output, without the factor the loss is scaled by."""
        found = {}
        for output, error in output_errors(graph):
            tangent = graph.loss_tangent(value(output).dtype)
            like = _signal(info(output).block)
            found[output] = graph.splice(
                lambda e, t: e / t * (self.beta * e.shape[0]), [error, tangent], like=like, whole=False
            )
        return found

    def _links(self, graph: JointGraph, state: fx.Node, name: str) -> list[_Link]:
        """The blocks that read a state, each with its output."""
        blocks = list(dict.fromkeys(info(user).block for user in graph.crossing(state, loss=False)))
        found = []
        for block in blocks:
            outputs = [o for o in graph.model_outputs if info(o).block == block] or [
                b for b in graph.boundaries(block) if graph.crossing(b, loss=False)
            ]
            outputs = [o for o in outputs if state in ancestors([o])]
            found += [
                _Link(f"{name}.{block}.{i}" if i else f"{name}.{block}", state, o, block) for i, o in enumerate(outputs)
            ]
        return found

    def inverse(self, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """G on flattened samples."""
        made = y.flatten(1).to(weight.dtype) @ weight
        return torch.tanh(made) if self.activation == "tanh" else made

    def _learn(self, graph: JointGraph, link: _Link) -> fx.Node:
        rows = [value(node).shape[0] for node in (link.source, link.output)]
        if not same_size(*rows):
            raise RuleError(
                f"target_propagation inverts block {link.block} row by row, and it makes {hint(rows[1])} rows of "
                f"{hint(rows[0])}, numbers that need not be the same",
                node=link.source.name,
                module=info(link.source).module,
                remedy="keep the batch dimension first, or choose blocks (blocks=) that do",
            )
        wide, narrow = sample_width(link.output), sample_width(link.source)
        name = self.state_name(f"inverse.{link.name}")
        weight = graph.add_state(name, (wide, narrow), fill_feedback("uniform", self.scale / math.sqrt(wide)))
        if not self.iterations:
            return weight
        replay = Replay(graph, [link.output], [link.source], self.name)
        counter, noise, streams = graph.counter(), self.noise, (graph.stream(), graph.stream())
        like = _signal(link.block).but(stage="forward")
        number = graph.splice(lambda drawn: drawn.new_zeros(()), [counter], like=like, whole=False)

        def step(
            number: torch.Tensor,
            held: torch.Tensor,
            drawn: torch.Tensor,
            h: torch.Tensor,
            y: torch.Tensor,
            *inputs: torch.Tensor,
        ) -> list[torch.Tensor]:
            xi = noise * random.direction(drawn, streams[0], h.shape, number, "normal", h.dtype)
            zeta = noise * random.direction(drawn, streams[1], y.shape, number, "normal", y.dtype)
            moved = replay({link.source: h + xi}, inputs, copy="feedback")[0].detach()
            with torch.enable_grad():
                leaf = held.detach().requires_grad_()
                base = self.inverse(y, leaf)
                gain = (xi.flatten(1).to(leaf.dtype) * (self.inverse(moved, leaf) - base)).sum()
                size = (self.inverse(y + zeta, leaf) - base).square().sum()
                (slope,) = torch.autograd.grad((size - 2 * gain) / (h.shape[0] * noise**2), leaf)
            return [number + 1, held - self.rate * slope]

        inputs = [counter, link.source, link.output, *replay.inputs]
        learned = graph.repeat(step, [number, weight], self.iterations, inputs=inputs, like=like)[1]
        graph.add_output(StateUpdate(name), learned)
        return learned

    def _carry(self, graph: JointGraph, link: _Link, inverse: fx.Node, above: fx.Node) -> fx.Node:
        """G(y) - G(t_y), y - t_y being what came from above: the difference h - t_h of the block before."""

        def carry(weight: torch.Tensor, h: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
            made = self.inverse(y, weight) - self.inverse(y - d, weight)
            return made.reshape(h.shape).to(h.dtype)

        made: fx.Node = graph.splice(
            carry, [inverse, link.source, link.output, above], like=_signal(link.block), whole=False
        )
        return made

    @staticmethod
    def _sum(graph: JointGraph, terms: Sequence[fx.Node], state: fx.Node) -> fx.Node:
        total = terms[0]
        for term in terms[1:]:
            total = graph.emit(torch.ops.aten.add.Tensor, (total, term), like=_signal(info(state).block))
        return total


def _signal(block: str) -> NodeInfo:
    return NodeInfo(role=Role.SIGNAL, block=block, module=block)
