"""Likelihood ratio: noise on pre-activations; what a noise did to the loss tells the gradient, without a derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.rules._feedback import hidden_boundaries
from graphrewrite.passes.rules._forward_forward import known
from graphrewrite.passes.rules._perturb import (
    Noise,
    PerSample,
    perturbed_values,
    readers,
    replayed,
    spread,
    where_samples_meet,
)
from graphrewrite.passes.rules._second_pass import same_draws
from graphrewrite.passes.rules._task import Task
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, Loss, NodeInfo, Role, UserInput, info, is_float, value
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class LikelihoodRatio(Rule):
    """Add noise to chosen values in training, and let (loss - baseline) x noise / sigma be their cotangents.

    z <- z + sigma epsilon with epsilon ~ N(0, 1) turns the network into a smooth random one; the gradient of its
    expected loss is E[loss epsilon / sigma] at z, whatever lies between z and the loss: operators without a
    derivative, opaque ones, samplers. The operator that made z turns this into the gradient of its weights. Each
    sample has its own loss where samples do not meet; else there is the batch's.

    Antithetic pairs are two forward passes with noise of opposite signs and the same dropout masks; a baseline that
    does not hang on the noise leaves the mean where it is. The loss that is returned is that of the first noisy pass.
    Noise is drawn again where it is needed: one input per perturbed operator and pass is saved, or none with `replay`,
    which runs the passes again in the backward; the gradients are the same, bit by bit. Blocks of other rules
    behind learn in the first noisy pass; those in front get the estimates as cotangents.

    Batch-norm uses the statistics of each noisy pass; the running ones are updated by the first. Evaluation is
    without noise.

    Args:
        sigma: Standard deviation of the noise.
        at: `"operators"`: on the results of operators that read a parameter; `"boundaries"`: on what leaves a block,
            whose inside is then differentiated exactly.
        samples: How many draws (pairs, if antithetic) the gradient is the mean of.
        antithetic: Whether each draw is used with both signs.
        baseline: What is subtracted from the loss: `"none"`; `"clean"`: the loss without noise, one more pass;
            `"running"`: a running mean of the batch's loss.
        momentum: Of the running mean.
        per_sample: `"auto"`: own losses where every operator is known to keep samples apart and the loss is a mean
            over samples; `"always"`: at your word; `"never"`.
        per_rank: Whether the replicas of a model under DDP draw noise of their own.
        replay: Whether the backward runs the forward passes again instead of saving the operators' inputs. Dropout
            masks stay saved.
    """

    sigma: float = 0.1
    at: Literal["operators", "boundaries"] = "operators"
    samples: int = 1
    antithetic: bool = True
    baseline: Literal["none", "clean", "running"] = "none"
    momentum: float = 0.9
    per_sample: PerSample = "auto"
    per_rank: bool = True
    replay: bool = False

    name = "likelihood_ratio"
    summary = "likelihood ratio: noise and the loss it leads to, through operators without a derivative"
    formula = "z_l ← z_l + σε_l;  δ_l = (L − b) ε_l / σ;  G_l = δ_l h_{l−1}ᵀ"
    paper = "Jiang et al., One Forward is Enough for Neural Network Training via Likelihood Ratio Method, 2024"
    needs_loss = True

    def requires(self, graph: JointGraph) -> None:
        """Noise, known options, a loss."""
        known("at", self.at, ("operators", "boundaries"))
        known("baseline", self.baseline, ("none", "clean", "running"))
        known("per_sample", self.per_sample, ("auto", "always", "never"))
        if not self.sigma > 0:
            raise RuleError(
                f"sigma={self.sigma:g} perturbs nothing: the likelihood ratio divides by it", remedy="use sigma=0.1"
            )
        if self.samples < 1:
            raise RuleError(f"samples={self.samples} draws no noise", remedy="use 1 or more")
        if not graph.has_loss:
            raise RuleError(
                f"{self.name} needs the targets in the graph",
                remedy="train with compiled.loss(x, y), give example_targets",
            )

    def run(self, graph: JointGraph) -> PassResult:
        """Noisy passes, their losses, and the signals made of them."""
        places = self._places(graph)
        task = self._task(graph, places)
        signs = (1.0, -1.0) if self.antithetic else (1.0,)
        with graph.deferred():
            counter = graph.counter()
            noises = {place: [self._noise(graph) for _ in range(self.samples)] for place in places}
            clean = self._copy(graph, "clean") if self.baseline == "clean" else {}
            passes: list[dict[fx.Node, fx.Node]] = [{}]
            passes += [self._copy(graph, f"noise{i}") for i in range(1, self.samples * len(signs))]
            drawn: list[tuple[fx.Node, Noise, float]] = []
            losses = []
            for number, copies in enumerate(passes):
                sign = signs[number % len(signs)]
                noisy: dict[fx.Node, fx.Node] = {}
                for place in places:
                    held, noise = copies.get(place, place), noises[place][number // len(signs)]
                    add = self._add(noise, sign)
                    users = readers(held)
                    noisy[held] = graph.map_value(held, add, consumers=users, inputs=[counter], block=info(held).block)
                    drawn.append((held, noise, sign))
                losses.append(self._loss(graph, task, copies, noisy))
            base = self._base(graph, task, clean, losses[0])
            gains = [loss if base is None else _minus(graph, loss, base) for loss in losses]
            share = self._share(graph, task, len(passes))
            for number, (held, noise, sign) in enumerate(drawn):
                inputs = [counter, held, gains[number // len(places)], share]
                graph.redirect(held, self._signal(noise, sign), inputs, consumers=readers(held))
        if self.replay:
            replayed(graph)
        return PassResult(graph, True)

    def _noise(self, graph: JointGraph) -> Noise:
        return Noise(graph.stream(), "normal", self.per_rank)

    def _places(self, graph: JointGraph) -> list[fx.Node]:
        if self.at == "operators":
            return perturbed_values(graph)
        places = [boundary for boundary, _ in hidden_boundaries(graph)]
        own = {block.name for block in graph.rule_blocks()}
        places += [n for n in graph.model_outputs if info(n).block in own and n not in places]
        if not places:
            raise RuleError("no differentiable value leaves these blocks", remedy="use at='operators'")
        return places

    def _task(self, graph: JointGraph, places: Sequence[fx.Node]) -> Task | None:
        """The loss per sample, or None for the loss of the batch."""
        if self.per_sample == "never":
            return None
        task = Task.of(graph, self.name)
        if self.per_sample == "auto":
            met = where_samples_meet(graph, task.answer, places)
            if met is not None:
                self.fail(graph, f"one loss for the whole batch: {met[1]}", met[0])
                return None
        reason = task.why_no_mean()
        if reason is None:
            return task
        if self.per_sample == "always":
            raise RuleError(f"the loss has no value per sample: {reason}", remedy="use per_sample='never'")
        self.fail(graph, f"one loss for the whole batch: {reason}", graph.outputs[Loss()])
        return None

    def _copy(self, graph: JointGraph, label: str) -> dict[fx.Node, fx.Node]:
        inputs = [n for s, n in graph.inputs.items() if isinstance(s, UserInput) and is_float(n)]
        inputs = inputs or [n for s, n in graph.inputs.items() if isinstance(s, UserInput)]
        return graph.clone_forward({**{n: n for n in inputs}, **same_draws(graph, self.name)}, label)

    @staticmethod
    def _loss(
        graph: JointGraph, task: Task | None, copies: dict[fx.Node, fx.Node], noisy: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        """The loss of a pass: per sample, or of the batch."""
        if task is None:
            loss = graph.outputs[Loss()]
            return copies.get(loss, loss)
        like = NodeInfo(role=Role.TANGENT, block=LOSS_BLOCK, module=LOSS_BLOCK)
        answer = copies.get(task.answer, task.answer)
        made: fx.Node = graph.splice(task.losses, [noisy.get(answer, answer), *task.targets], like=like, whole=False)
        return made

    def _base(
        self, graph: JointGraph, task: Task | None, clean: dict[fx.Node, fx.Node], loss: fx.Node
    ) -> fx.Node | None:
        if self.baseline == "none":
            return None
        if self.baseline == "clean":
            return self._loss(graph, task, clean, {})
        name, momentum = self.state_name("baseline"), self.momentum
        state = graph.add_state(name, (), lambda tensor, _generator: tensor.zero_(), dtype=value(loss).dtype)
        graph.update_state(name, lambda held, loss: momentum * held + (1 - momentum) * loss.mean(), [loss])
        return state

    @staticmethod
    def _share(graph: JointGraph, task: Task | None, passes: int) -> fx.Node:
        """What one sample of one pass has of the mean."""
        like = NodeInfo(role=Role.SIGNAL, block=LOSS_BLOCK, module=LOSS_BLOCK)
        inputs = [graph.loss_tangent(value(graph.outputs[Loss()]).dtype), *([] if task is None else task.inputs)]

        def share(tangent: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            return tangent / (passes if task is None else task.count(*values) * passes)

        made: fx.Node = graph.splice(share, inputs, like=like, whole=False)
        return made

    def _signal(self, noise: Noise, sign: float) -> Callable[..., torch.Tensor]:
        scale = sign / self.sigma

        def signal(counter: torch.Tensor, like: torch.Tensor, gain: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
            return noise.like(counter, like) * spread(gain * (share * scale), like)

        return signal

    def _add(self, noise: Noise, sign: float) -> Callable[..., torch.Tensor]:
        scale = sign * self.sigma

        def add(held: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
            return held + scale * noise.like(counter, held)

        return add


def _minus(graph: JointGraph, loss: fx.Node, base: fx.Node) -> fx.Node:
    """In the forward: a running baseline is another one when the backward runs."""
    like = NodeInfo(role=Role.TANGENT, block=LOSS_BLOCK, module=LOSS_BLOCK)
    made: fx.Node = graph.splice(lambda loss, base: loss - base, [loss, base], like=like, whole=False)
    return made
