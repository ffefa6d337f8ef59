"""Forward gradient: no backward; random directions, and the directional derivative of the loss along each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.rules._forward_forward import known
from graphrewrite.passes.rules._guesses import LocalGuess, guess, project
from graphrewrite.passes.rules._heads import Head
from graphrewrite.passes.rules._perturb import (
    Distribution,
    Noise,
    PerSample,
    noise_node,
    perturbed_values,
    readers,
    replayed,
    size_of,
    spread,
    trained_leaves,
    where_samples_meet,
)
from graphrewrite.passes.rules._replay import refuse_empty_batch
from graphrewrite.passes.rules._task import Task
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, Loss, NodeInfo, Role, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class ForwardGradient(Rule):
    """Push random tangents forward with the activations, and let (directional derivative) x (tangent) be the gradient.

    With `perturb="weights"` every parameter of the rule's blocks gets a tangent v, and G = (dL . v) v. With
    `perturb="activities"` the tangents u sit on the results of the operators that read a parameter, delta = (dL . u) u
    is the cotangent there, and the operator's own weight gradient makes G of it. Both are unbiased; the relative
    variance is (d + 1) / tangents for normal tangents, d being how many numbers are perturbed together: all
    parameters, or all units (of one sample, if each sample has a derivative of its own).

    With `guess="local"` the tangent of the weights is no noise but the gradient of a local loss, that of the heads of
    `local_loss`, and G = (dL . v) v / |v|^2 is the projection of the gradient on it: of low variance, not unbiased. The
    last block then has its exact gradient, and the heads learn from their own losses.

    The noise is computed again where it is needed, and no cotangent crosses an operator: perturbed weights leave
    nothing to save between forward and backward, perturbed activities one input per perturbed operator, or none with
    `replay`, which runs the forward again in the backward; the gradients are the same, bit by bit. Blocks of other
    rules in front of these get the cotangents as usual, in expectation.

    Dropout masks are constants to a derivative. Batch-norm lets samples depend on each other: then there is one
    derivative for the batch, see `per_sample`.

    Args:
        perturb: `"activities"` or `"weights"`.
        tangents: How many directions the gradient is the mean of.
        distribution: `"normal"`, or `"signs"`, -1 and 1, whose relative variance is (d - 1) / tangents.
        per_sample: Activities: one directional derivative per sample instead of one for the batch. `"auto"`: where
            every operator is known to keep samples apart; `"always"`: at your word; `"never"`.
        per_rank: Whether the replicas of a model under DDP draw noise of their own.
        replay: Activities: whether the backward runs the forward again instead of saving the operators' inputs. Dropout
            masks stay saved.
        guess: `"random"`, or `"local"`, with perturbed weights.
        head: The head of the local losses, as in `local_loss`.
        separate: Local guesses: one directional derivative per block, each with a pass of its own, instead of one for
            all blocks together.
        limit: Above this predicted relative variance there is a warning.
    """

    perturb: Literal["activities", "weights"] = "activities"
    tangents: int = 1
    distribution: Distribution = "normal"
    per_sample: PerSample = "auto"
    per_rank: bool = True
    replay: bool = False
    guess: Literal["random", "local"] = "random"
    head: str | Head | type[Head] = "pred"
    separate: bool = False
    limit: float = 10_000.0

    name = "forward_gradient"
    summary = "forward gradient: directional derivatives along random tangents, no backward"
    formula = "G = (∇L·v) v;  δ_l = (Σ_k u_k·∂L/∂z_k) u_l, G_l = δ_l h_{l−1}ᵀ"
    paper = (
        "Baydin et al., Gradients without Backpropagation, 2022; Ren et al., Scaling Forward Gradient With Local "
        "Losses, 2023; local guesses: Fournier et al., Can Forward Gradient Match Backpropagation?, 2023"
    )
    needs_loss = True

    @property
    def learns_state(self) -> bool:  # type: ignore[override]
        """The heads of local guesses are learned state."""
        return self.guess == "local" and self._guesser.learns_state

    @property
    def _guesser(self) -> LocalGuess:
        return LocalGuess(head=self.head)

    def requires(self, graph: JointGraph) -> None:
        """Known options, at least one tangent, a loss."""
        known("perturb", self.perturb, ("activities", "weights"))
        known("distribution", self.distribution, ("normal", "signs"))
        known("per_sample", self.per_sample, ("auto", "always", "never"))
        known("guess", self.guess, ("random", "local"))
        if self.guess == "local":
            if self.perturb != "weights" or self.tangents != 1:
                raise RuleError(
                    "a local guess is one direction for the weights",
                    remedy="use forward_gradient{perturb=weights,guess=local}",
                )
            self._guesser.requires(graph)
        if self.tangents < 1:
            raise RuleError(
                f"tangents={self.tangents} gives no direction to differentiate along", remedy="use 1 or more"
            )
        if self.replay and self.perturb == "weights":
            raise RuleError(
                "perturbed weights leave nothing to save that could be computed again",
                remedy="leave replay out, or use perturb=activities",
            )
        if not graph.has_loss:
            raise RuleError(
                f"{self.name} needs the targets in the graph",
                remedy="train with compiled.loss(x, y), give example_targets",
            )
        if self.perturb == "weights":
            refuse_empty_batch(graph, self.name)

    def run(self, graph: JointGraph) -> PassResult:
        """Tangents, a forward-mode pass for each, and the gradients made of them."""
        if self.guess == "local":
            found = guess(graph, self._guesser)
            together = {leaf: v for guesses in found.values() for leaf, v in guesses.items()}
            groups = list(found.values()) if self.separate else [together]
            # none if the hidden blocks are frozen: the last one has its exact gradient
            project(graph, [group for group in groups if group])
            return PassResult(graph, True)
        with graph.deferred():
            if self.perturb == "weights":
                self._perturb_weights(graph)
            else:
                self._perturb_activities(graph)
        if self.replay:
            replayed(graph)
        return PassResult(graph, True)

    # --- weights ---------------------------------------------------------------------------------------------------

    def _perturb_weights(self, graph: JointGraph) -> None:
        leaves, counter, loss = trained_leaves(graph), graph.counter(), graph.outputs[Loss()]
        self._warn(size_of(leaves), "parameters")
        draws = self._draws(graph, leaves)
        slopes: list[fx.Node] = []
        for drawn in draws:
            pushed = self._pushed(graph, drawn, counter)
            if loss not in pushed:
                raise RuleError("the loss does not depend on the parameters of this rule's blocks")
            slopes.append(pushed[loss])
        tangent = graph.loss_tangent(value(loss).dtype)
        for leaf in leaves:
            graph.redirect(leaf, self._weighted([drawn[leaf] for drawn in draws]), [counter, leaf, tangent, *slopes])

    # --- activities ------------------------------------------------------------------------------------------------

    def _perturb_activities(self, graph: JointGraph) -> None:
        places, counter, loss = perturbed_values(graph), graph.counter(), graph.outputs[Loss()]
        task = Task.of(graph, self.name) if self.per_sample != "never" else None
        if task is not None and self.per_sample == "auto":
            met = where_samples_meet(graph, task.answer, places)
            if met is not None:
                self.fail(graph, f"one directional derivative for the whole batch: {met[1]}", met[0])
                task = None
        self._warn(size_of(places, per_sample=task is not None), "units")
        draws = self._draws(graph, places)
        slopes: list[fx.Node] = []
        for drawn in draws:
            pushed = self._pushed(graph, drawn, counter)
            end = loss if task is None else task.answer
            if end not in pushed:
                raise RuleError(f"{end.name} does not depend on the parameters of this rule's blocks", node=end.name)
            slopes.append(pushed[loss] if task is None else self._slope_per_sample(graph, task, pushed[end]))
        share = graph.loss_tangent(value(loss).dtype) if task is None else task.share_node(graph)
        for place in places:
            inputs = [counter, place, share, *slopes]
            noises = [drawn[place] for drawn in draws]
            graph.redirect(place, self._weighted(noises), inputs, consumers=readers(place))

    @staticmethod
    def _slope_per_sample(graph: JointGraph, task: Task, moved: fx.Node) -> fx.Node:
        """Error times J u, per sample: the derivative of each sample's own loss."""

        def slope(moved: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            products = task.error(*values) * moved
            return products.flatten(1).sum(1) if products.dim() > 1 else products

        like = NodeInfo(role=Role.TANGENT, block=LOSS_BLOCK, module=LOSS_BLOCK)
        made: fx.Node = graph.splice(slope, [moved, *task.inputs], like=like, whole=False)
        return made

    # --- both ------------------------------------------------------------------------------------------------------

    def _draws(self, graph: JointGraph, perturbed: Sequence[fx.Node]) -> list[dict[fx.Node, Noise]]:
        """For each tangent, the noise on every perturbed value."""
        return [
            {node: Noise(graph.stream(), self.distribution, self.per_rank) for node in perturbed}
            for _ in range(self.tangents)
        ]

    @staticmethod
    def _pushed(graph: JointGraph, drawn: dict[fx.Node, Noise], counter: fx.Node) -> dict[fx.Node, fx.Node]:
        """The tangents of everything that depends on the perturbed values."""
        return graph.push_forward({node: noise_node(graph, noise, counter, node) for node, noise in drawn.items()})

    def _weighted(self, noises: list[Noise]) -> Callable[..., torch.Tensor]:
        """The mean over tangents of slope x noise, the noise drawn again."""

        def signal(
            counter: torch.Tensor, like: torch.Tensor, share: torch.Tensor, *slopes: torch.Tensor
        ) -> torch.Tensor:
            total = None
            for noise, slope in zip(noises, slopes, strict=True):
                part = noise.like(counter, like) * spread(slope * share / len(noises), like)
                total = part if total is None else total + part
            assert total is not None
            return total

        return signal

    def _warn(self, numbers: int, what: str) -> None:
        """Too few tangents for the width."""
        variance = (numbers + (1 if self.distribution == "normal" else -1)) / self.tangents
        if variance > self.limit:
            warnings.warn(
                f"{self.name} perturbs {numbers} {what} at once with {self.tangents} tangent"
                f"{'s' if self.tangents > 1 else ''}: the predicted variance of the gradient is {variance:.3g} times "
                "its square. More tangents, perturb='activities', or smaller rates would help",
                stacklevel=2,
            )
