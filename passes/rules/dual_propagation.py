"""Dual propagation: each activation holds two states; their difference carries the error, their mean the activity."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import is_view
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Role, flat_inputs, info, is_backward
from graphrewrite.graph.ops import ACTIVATIONS, CONVOLUTIONS, MATMULS
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class DualPropagation(Rule):
    """Give activations a finite difference in the place of their derivative, and weights the mean of the two states.

    The output is nudged both ways, z_L± = a_L ∓ γ dL/da_L, and one sweep from the top sets z_l± = φ(a_l ∓ γ c_l) with
    c_l = W_{l+1}^T (z_{l+1}⁻ - z_{l+1}⁺) / 2γ. So the cotangent of a pre-activation is
    (φ(a + γ c) - φ(a - γ c)) / 2γ, c being that of the activation, and the next weight's gradient reads
    (φ(a + γ c) + φ(a - γ c)) / 2 in the place of φ(a). What is no activation (normalisation, pooling, attention)
    keeps its own derivative. For piecewise linear activations whose argument keeps its sign this is backpropagation
    at every γ; for smooth ones it differs by O(γ²).

    c is the cotangent as it arrives: it holds the 1/batch of a mean loss, so γ nudges each sample by γ/batch. An
    activation that the model writes out (a GELU by tanh) is replaced at its own non-linear operator.

    Args:
        gamma: Strength of the nudge.
        mean_state: Let weight gradients read the mean of the two states; False: the forward's activation.
    """

    gamma: float = 0.5
    mean_state: bool = True

    name = "dual_propagation"
    summary = "dual propagation: finite differences of two states in the place of activation derivatives"
    formula = "z_l^± = φ(a_l ∓ γ c_l);  δ_l = (z_l⁻ − z_l⁺)/2γ;  G_{l+1} = δ_{l+1} (½(z_l⁺ + z_l⁻))ᵀ"
    paper = "Høier, Staudt, Zach: Dual Propagation: Accelerating Contrastive Hebbian Learning with Dyadic Neurons, 2023"

    def requires(self, graph: JointGraph) -> None:
        """A positive nudge."""
        if not self.gamma > 0:
            raise RuleError(f"gamma={self.gamma} is no nudge", remedy="use gamma > 0")

    def run(self, graph: JointGraph) -> PassResult:
        """Replace the derivatives of the activations, then what weight gradients read."""
        blocks = {block.name for block in graph.rule_blocks()}
        found = [
            node
            for node in graph.forward_nodes()
            if node.target in ACTIVATIONS and info(node).block in blocks and graph.cotangent(node) is not None
        ]
        changed = []
        with graph.deferred():
            for node in found:
                if len(flat_inputs(node)) != 1:
                    self.fail(graph, "an activation with parameters of its own keeps its derivative", node)
                    continue
                graph.replace_vjp(node, self._difference(node), residuals=flat_inputs(node))
                changed.append(node)
        if not changed:
            self.fail(graph, "no activation: on a linear network dual propagation is backpropagation")
        if self.mean_state:
            with graph.deferred():
                for node in changed:
                    self._use_mean(graph, node)
        return PassResult(graph, bool(changed))

    def _states(self, node: fx.Node) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """`(argument, cotangent)` -> the two states, the one along the cotangent first."""
        target: Any = node.target
        rest, kwargs, gamma = node.args[1:], node.kwargs, self.gamma

        def states(argument: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nudge = gamma * cotangent
            return target(argument + nudge, *rest, **kwargs), target(argument - nudge, *rest, **kwargs)

        return states

    def _difference(self, node: fx.Node) -> Callable[..., torch.Tensor]:
        states, gamma = self._states(node), self.gamma

        def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> torch.Tensor:
            along, against = states(residuals[0], cotangent)
            return (along - against) / (2 * gamma)

        return bwd

    def _use_mean(self, graph: JointGraph, node: fx.Node) -> None:
        """Let the weight gradients of the products that read an activation read the mean of its states."""
        readers = [
            (user, value, chain)
            for value, chain in _seen_as(node)
            for user in value.users
            if not is_backward(user) and user.target in MATMULS | CONVOLUTIONS and _has_weight_row(graph, user)
        ]
        cotangent = graph.cotangent(node)
        if not readers or cotangent is None:
            return
        states = self._states(node)

        def mean(argument: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
            along, against = states(argument, held)
            return 0.5 * (along + against)

        like = info(node).but(role=Role.SIGNAL, mirrors=None)
        made: fx.Node = graph.splice(mean, [flat_inputs(node)[0], cotangent], like=like, whole=False)
        for user, value, chain in readers:
            held = made
            for base, view in itertools.pairwise([node, *chain]):
                args, kwargs = fx.map_arg((view.args, view.kwargs), functools.partial(_instead, base, held))
                held = graph.emit(view.target, args, kwargs, like=like)  # type: ignore[arg-type]
            graph.replace_primal(user, flat_inputs(user).index(value), held, part="w")


def _instead(old: fx.Node, new: fx.Node, node: fx.Node) -> fx.Node:
    return new if node is old else node


def _seen_as(node: fx.Node) -> list[tuple[fx.Node, list[fx.Node]]]:
    """A value and its views, each with the chain of view operators that leads to it."""
    found: list[tuple[fx.Node, list[fx.Node]]] = [(node, [])]
    for value, chain in found:
        found += [(u, [*chain, u]) for u in value.users if not is_backward(u) and is_view(u)]
    return found


def _has_weight_row(graph: JointGraph, node: fx.Node) -> bool:
    assert graph.backward is not None
    return any(row.part == "w" and row.plain for row in graph.backward.rows(node))
