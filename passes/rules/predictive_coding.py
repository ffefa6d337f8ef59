"""Predictive coding: activations settle between their own prediction and what the next block needs; weights follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from graphrewrite.passes.rules._energy import Layer, layers_of, read_by, settled_blocks, warn_about_distance
from graphrewrite.passes.rules._replay import refuse_empty_batch, trained_leaves
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, LossTerm, NodeInfo, Role, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import FINER_BLOCKS, Rule

Tensors = Sequence[torch.Tensor]

SETTLE = NodeInfo(role=Role.SIGNAL, block=LOSS_BLOCK, stage="forward")
"""The loop in which activations settle runs in the forward: nothing that came before it has to be kept."""


@dataclass(frozen=True)
class PredictiveCoding(Rule):
    """Let the activations between blocks settle in an energy, then let every block learn from its own error.

    Each hidden block l predicts f_l(v_{l-1}); v_l is free, starts at the forward pass's activation, and descends

        F = 1/2 sum_l |v_l - f_l(v_{l-1})|^2 + beta L(f_top(v)),    v_l <- v_l + step_size (e_l - J_{l+1}^T e_{l+1})

    for a number of synchronous steps, e_l = f_l(v_{l-1}) - v_l. The gradient of a block's weights is that of F / beta:
    its own derivative at v_{l-1}, applied to e_l. What reads several blocks (a skip) gets the errors of all; blocks
    that reach the loss without another boundary have no state and learn from the loss at the settled activations.

    The settling is one loop of the graph, whose size does not depend on the number of steps.

    Variants: `"strict"` as above; `"fixed"` keeps predictions and derivatives those of the forward pass, so that
    e_l <- (1 - step_size) e_l + step_size J_{l+1}^T e_{l+1}, which goes to backpropagation with more steps;
    `"exact"` is fixed with step size 1 and as many steps as states lie one behind the other: backpropagation, up to
    rounding.

    `incremental` updates the weights in every step, by -rate dF/dw / beta, as iPC does. The gradient is the sum of what
    was moved, so that SGD with learning rate `rate` ends where the loop ended; the loop works on copies.

    `compiled.losses` holds each hidden block's energy 1/2 |e_l|^2 / beta after settling, and the task loss before.

    Args:
        variant: See above.
        steps: Settling steps.
        step_size: Of the activations.
        nudge: beta; default: the size of the batch, so that a mean loss acts on every sample with its own full error.
        incremental: See above; with strict only.
        rate: Learning rate of the steps inside, with `incremental`.
    """

    variant: Literal["strict", "fixed", "exact"] = "strict"
    steps: int = 20
    step_size: float = 0.1
    nudge: float | None = None
    incremental: bool = False
    rate: float = 0.01

    name = "predictive_coding"
    summary = "predictive coding: activations settle in an energy, blocks learn from local errors"
    formula = "v_l ← v_l + γ(ε_l − J_{l+1}ᵀ ε_{l+1}),  ε_l = f_l(v_{l−1}) − v_l;  G_l = (∂f_l/∂w)ᵀ ε_l"
    paper = (
        "Rao, Ballard, 1999; Whittington, Bogacz, 2017; Rosenbaum, On the relationship between predictive coding and "
        "backpropagation, 2022; Salvatori et al., Incremental predictive coding, 2024"
    )
    needs_loss = True

    def requires(self, graph: JointGraph) -> None:
        """Options that make sense, a loss, and activations to settle."""
        if self.variant not in ("strict", "fixed", "exact"):
            raise RuleError(f"variant={self.variant!r} is unknown", remedy="use 'strict', 'fixed' or 'exact'")
        if self.steps < 0 or not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise RuleError(
                f"predictive_coding needs steps >= 0 and step_size > 0, got steps={self.steps}, "
                f"step_size={self.step_size:g}"
            )
        if self.nudge is not None and not self.nudge > 0:
            raise RuleError(f"nudge={self.nudge:g} is no nudge", remedy="use nudge > 0, or leave it out")
        if self.incremental and self.variant != "strict":
            raise RuleError("incremental updates move weights while activations settle", remedy="use variant='strict'")
        if self.incremental and not self.rate > 0:
            raise RuleError(f"rate={self.rate:g} moves no weight", remedy="use rate > 0")
        if not graph.has_loss:
            raise RuleError("predictive_coding needs the loss", remedy="train with compiled.loss(x, y)")
        if self.incremental:
            refuse_empty_batch(graph, self.name)
        if not settled_blocks(graph):
            raise RuleError(
                "predictive_coding needs a block before the one that computes the output: there is nothing to settle",
                remedy=FINER_BLOCKS,
            )

    def run(self, graph: JointGraph) -> PassResult:
        """Settle in a loop, then give every weight its local gradient."""
        system = _System(self, graph)
        # the pass in which the weights learn reads activations that have settled
        graph.forward_may_read_cotangents = True
        with graph.deferred():
            if self.incremental:
                values, gradients = system.settle_and_learn()
                system.report(values)
            else:
                values = system.settle()
                system.report(values)
                gradients = system.learn(values)
            system.give(gradients)
        return PassResult(graph, True)


Gradients = dict[fx.Node, list[fx.Node]]


class _System:
    """The blocks of one graph as the parts of an energy."""

    def __init__(self, rule: PredictiveCoding, graph: JointGraph) -> None:
        self.rule = rule
        self.graph = graph
        self.states = [boundary for boundaries in settled_blocks(graph).values() for boundary in boundaries]
        self.leaves = trained_leaves(graph)
        self.layers, self.top = layers_of(graph, self.states, (), rule.name)
        self.learning, self.learning_top = layers_of(graph, self.states, self.leaves, rule.name)
        self.fixed = rule.variant != "strict"
        read = read_by(graph, self.states, rule.name)
        self.depth = _depth(read)
        """The most states one behind the other: two of one block may be, as in a skip around its pooling."""
        if rule.variant != "exact":
            # weights that move in every step read the error of the step before
            warn_about_distance(rule.name, read, rule.steps, "steps", late=int(rule.incremental))

    # --- settling --------------------------------------------------------------------------------------------------

    def settle(self) -> list[fx.Node]:
        """The settled activations; for fixed predictions, the errors."""
        step = self._fixed_step if self.fixed else self._strict_step
        inputs = list(dict.fromkeys(n for layer in (*self.layers, self.top) for n in layer.replay.inputs))
        start, extra = self.states, []
        if self.fixed:
            start = self.graph.splice(
                lambda *held: [torch.zeros_like(h) for h in held], self.states, like=SETTLE, whole=False
            )
            extra = [*self.states, *self._error_at_the_top(self.states)]
        count = len(self.states)

        def body(*values: torch.Tensor) -> list[torch.Tensor]:
            held = dict(zip(self.states, values[:count], strict=True))
            given = dict(zip([*inputs, *range(len(extra))], values[count:], strict=True))
            return step(held, given)

        steps = self.depth if self.rule.variant == "exact" else self.rule.steps
        return self.graph.repeat(body, start, steps, inputs=[*inputs, *extra], like=SETTLE)

    def _strict_step(self, held: Mapping[fx.Node, torch.Tensor], given: Mapping[Any, torch.Tensor]) -> list[Any]:
        change = {state: torch.zeros_like(v) for state, v in held.items()}
        for layer in self.layers:
            made, back = layer.pull(held, given, lambda made, layer=layer: _errors(layer, made, held))  # type: ignore[misc]
            for state, error in zip(layer.outputs, _errors(layer, made, held), strict=True):
                change[state] = change[state] + error
            change |= {state: change[state] - b for state, b in back.items()}
        _, back = self.top.pull(held, given, lambda made: [torch.ones_like(made[0]) * self._beta(held)])
        change |= {state: change[state] - b for state, b in back.items()}
        return [(v + self.rule.step_size * change[state]).to(v.dtype) for state, v in held.items()]

    def _fixed_step(self, errors: Mapping[fx.Node, torch.Tensor], given: Mapping[Any, torch.Tensor]) -> list[Any]:
        size = 1.0 if self.rule.variant == "exact" else self.rule.step_size
        count = len(self.states)
        held = {state: given[i] for i, state in enumerate(self.states)}
        arrived = {state: given[count + i] for i, state in enumerate(self.states)}
        for layer in self.layers:
            if layer.replay.reads:
                _, back = layer.pull(held, given, lambda _made, layer=layer: [errors[o] for o in layer.outputs])  # type: ignore[misc]
                arrived |= {state: arrived[state] + b for state, b in back.items()}
        return [((1 - size) * e + size * arrived[state]).to(e.dtype) for state, e in errors.items()]

    def _error_at_the_top(self, states: Sequence[fx.Node]) -> list[fx.Node]:
        """Beta times the loss's derivative by each state that the top reads, zero for the others."""
        inputs = self.top.replay.inputs

        def derive(*values: torch.Tensor) -> list[torch.Tensor]:
            held = dict(zip(states, values, strict=False))
            given = dict(zip(inputs, values[len(states) :], strict=True))
            _, back = self.top.pull(held, given, lambda made: [torch.ones_like(made[0]) * self._beta(held)])
            return [back[s] if s in back else torch.zeros_like(v) for s, v in held.items()]

        made: list[fx.Node] = self.graph.splice(derive, [*states, *inputs], like=SETTLE, whole=False)
        return made

    def _beta(self, held: Mapping[fx.Node, torch.Tensor]) -> Any:
        return self.rule.nudge if self.rule.nudge is not None else held[self.states[0]].shape[0]

    # --- learning --------------------------------------------------------------------------------------------------

    def learn(self, settled: Sequence[fx.Node]) -> Gradients:
        """Each weight's terms: its block's own derivative, applied to the block's error."""
        found: Gradients = {leaf: [] for leaf in self.leaves}
        for layer in (*self.learning, self.learning_top):
            wanted = [leaf for leaf in self.leaves if leaf in layer.replay.reads]
            if wanted:
                for leaf, node in zip(wanted, self._derivative(layer, wanted, settled), strict=True):
                    found[leaf].append(node)
        return found

    def _derivative(self, layer: Layer, wanted: Sequence[fx.Node], settled: Sequence[fx.Node]) -> list[fx.Node]:
        reads = [state for state in self.states if state in layer.replay.reads]
        own = [*layer.outputs] if layer is not self.learning_top else []
        position = dict(zip(self.states, settled, strict=True))
        at = reads if self.fixed else [position[state] for state in reads]
        errors = [position[state] for state in own]
        inputs, size = layer.replay.inputs, len(reads)

        def derive(*values: torch.Tensor) -> list[torch.Tensor]:
            given = iter(values)
            held = {state: next(given) for state in [*reads, *wanted]}
            ends = {state: next(given) for state in own}
            first = next(given)
            rest = dict(zip(inputs, given, strict=True))
            beta = self.rule.nudge if self.rule.nudge is not None else first.shape[0]

            def cotangents(made: Tensors) -> list[torch.Tensor]:
                if not own:
                    return [torch.ones_like(made[0])]
                signals = [ends[s] if self.fixed else m - ends[s] for s, m in zip(own, made, strict=True)]
                return [s / beta for s in signals]

            _, back = layer.pull(held, rest, cotangents, wrt=wanted)
            return [back[leaf] for leaf in wanted]

        nodes = [*at, *wanted, *errors, self.states[0], *inputs]
        assert size == len(at)
        like = NodeInfo(role=Role.GRADIENT, block=layer.block, module=layer.block)
        made: list[fx.Node] = self.graph.splice(derive, nodes, like=like, whole=False)
        return made

    def settle_and_learn(self) -> tuple[list[fx.Node], Gradients]:
        """Activations and weights move together; the weights' total movement is their gradient."""
        layers = (*self.learning, self.learning_top)
        inputs = list(dict.fromkeys(n for layer in layers for n in layer.replay.inputs))
        count, rate = len(self.states), self.rule.rate
        start = self.graph.splice(
            lambda *held: [torch.zeros_like(h) for h in held], self.leaves, like=SETTLE, whole=False
        )

        def body(*values: torch.Tensor) -> list[torch.Tensor]:
            given_values = iter(values)
            held = {state: next(given_values) for state in self.states}
            moved = {leaf: next(given_values) for leaf in self.leaves}
            weights = {leaf: next(given_values) - rate * moved[leaf] for leaf in self.leaves}
            given = dict(zip(inputs, given_values, strict=True))
            beta = self._beta(held)
            change = {node: torch.zeros_like(v) for node, v in (held | moved).items()}
            for layer in layers:
                top = layer is self.learning_top

                def cotangents(made: Tensors, layer: Layer = layer, top: bool = top) -> list[torch.Tensor]:
                    return [torch.ones_like(made[0]) * beta] if top else _errors(layer, made, held)

                made, back = layer.pull(held | weights, given, cotangents)
                if not top:
                    for state, error in zip(layer.outputs, _errors(layer, made, held), strict=True):
                        change[state] = change[state] + error
                change |= {node: change[node] - b for node, b in back.items()}
            size = self.rule.step_size
            return [
                *[(v + size * change[state]).to(v.dtype) for state, v in held.items()],
                *[(g - change[leaf] / beta).to(g.dtype) for leaf, g in moved.items()],
            ]

        ends = self.graph.repeat(
            body, [*self.states, *start], self.rule.steps, inputs=[*self.leaves, *inputs], like=SETTLE
        )
        return ends[:count], {leaf: [end] for leaf, end in zip(self.leaves, ends[count:], strict=True)}

    # --- results ---------------------------------------------------------------------------------------------------

    def report(self, settled: Sequence[fx.Node]) -> None:
        """The energy of every hidden block."""
        ends = dict(zip(self.states, settled, strict=True))
        for layer in self.layers:
            reads, inputs = [s for s in self.states if s in layer.replay.reads], layer.replay.inputs
            given = [ends[s] for s in (layer.outputs if self.fixed else [*reads, *layer.outputs])]

            def energy(*values: torch.Tensor, layer: Layer = layer, reads: Sequence[fx.Node] = reads) -> torch.Tensor:
                own = len(layer.outputs)
                if self.fixed:
                    errors: Tensors = values[:own]
                else:
                    held = dict(zip(reads, values, strict=False))
                    rest = values[len(reads) + own :]
                    made = layer.replay(held, rest, copy="settle")
                    errors = [m - v for m, v in zip(made, values[len(reads) :], strict=False)]
                beta = self.rule.nudge if self.rule.nudge is not None else errors[0].shape[0]
                total = sum((e.square().sum() for e in errors), torch.zeros_like(errors[0].sum()))
                return 0.5 * total / beta

            like = SETTLE.but(block=layer.block)
            node = self.graph.splice(energy, [*given, *([] if self.fixed else inputs)], like=like, whole=False)
            self.graph.add_output(LossTerm(layer.block), node)

    def give(self, gradients: Gradients) -> None:
        """Let the sums of the terms be the gradients."""
        for leaf, terms in gradients.items():
            if not terms:
                continue
            tangent = self.graph.loss_tangent(value(leaf).dtype)
            self.graph.redirect(leaf, _summed, [tangent, *terms])


def _depth(read: Mapping[fx.Node, set[fx.Node]]) -> int:
    depths: dict[fx.Node, int] = {}
    for end, before in read.items():
        depths[end] = 1 + max((depths[state] for state in before), default=0)
    return max(depths.values()) - 1


def _summed(tangent: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total * tangent


def _errors(layer: Layer, made: Tensors, held: Mapping[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
    return [(m - held[state]).detach() for m, state in zip(made, layer.outputs, strict=True)]
