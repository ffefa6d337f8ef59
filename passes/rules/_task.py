"""The task loss as a function of the model's answer: its error per sample, and its value per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.rules._site import IGNORED, OneAnswer, answer_of
from torch import fx
from torch.nn import functional as F

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import LOSS_BLOCK, NodeInfo, Role, Target, hint, is_float, value
from graphrewrite.objective import default_loss


@dataclass(frozen=True)
class Task:
    """The compile's loss on the model's answer and the targets.

    Attributes:
        answer: The output that the loss reads.
        targets: The leaves of the targets, in order.
        loss: `loss(answer, *targets) -> scalar`.
        averages_classes: Whether it is the default loss on class indices: a mean over those that are no -100.
    """

    answer: fx.Node
    targets: list[fx.Node]
    loss: Callable[..., torch.Tensor]
    averages_classes: bool

    @staticmethod
    def of(graph: JointGraph, rule: str) -> Task:
        """The task of a graph that holds a loss."""
        context = graph.context
        if not graph.has_loss:
            raise RuleError(
                f"{rule} needs the targets in the graph",
                remedy="train with compiled.loss(x, y), give example_targets",
            )
        answer = answer_of(graph).node
        found = {spec.index: node for spec, node in graph.inputs.items() if isinstance(spec, Target)}
        targets = [found[index] for index in sorted(found)]
        loss, outputs, rebuild = context.loss, context.outputs, context.targets
        assert loss is not None
        assert outputs is not None
        assert rebuild is not None

        def call(answer: torch.Tensor, *values: Any) -> torch.Tensor:
            made: torch.Tensor = loss(outputs(OneAnswer(answer)), rebuild(values))
            return made

        classes = (
            loss is default_loss
            and len(targets) == 1
            and isinstance(value(targets[0]), torch.Tensor)
            and not is_float(targets[0])
        )
        return Task(answer, targets, call, classes)

    @property
    def inputs(self) -> list[fx.Node]:
        """The answer, then the targets: the arguments of the functions below."""
        return [self.answer, *self.targets]

    def count(self, answer: torch.Tensor, *targets: Any) -> torch.Tensor | int:
        """How many samples (or tokens, or nodes) the mean loss is over."""
        if self.averages_classes:
            counted: torch.Tensor = (targets[0] != IGNORED).sum().clamp(min=1).to(answer.dtype)
            return counted
        return answer.shape[0]

    def error(self, answer: torch.Tensor, *targets: Any) -> torch.Tensor:
        """The derivative of the loss by the answer, per sample: without the 1/batch of a mean."""
        held = answer.detach().requires_grad_()
        with torch.enable_grad():
            (error,) = torch.autograd.grad(self.loss(held, *targets), held)
        return error.detach() * self.count(answer, *targets)

    def error_node(self, graph: JointGraph) -> fx.Node:
        """`error` as a node that runs in the forward."""
        like = NodeInfo(role=Role.SIGNAL, block=LOSS_BLOCK, module=LOSS_BLOCK, stage="forward")
        made: fx.Node = graph.splice(self.error, self.inputs, like=like, whole=False)
        return made

    def share_node(self, graph: JointGraph) -> fx.Node:
        """What one sample has of the mean: the loss's cotangent over `count`."""
        like = NodeInfo(role=Role.SIGNAL, block=LOSS_BLOCK, module=LOSS_BLOCK)
        inputs = [graph.loss_tangent(value(self.answer).dtype), *self.inputs]
        made: fx.Node = graph.splice(
            lambda tangent, *values: tangent / self.count(*values), inputs, like=like, whole=False
        )
        return made

    def losses(self, answer: torch.Tensor, *targets: Any) -> torch.Tensor:
        """The loss of each sample alone; 0 for samples without a target."""

        def one(answer: torch.Tensor, *targets: Any) -> torch.Tensor:
            return self.loss(answer.unsqueeze(0), *(t.unsqueeze(0) for t in targets))

        if self.averages_classes:
            return F.cross_entropy(answer, targets[0], reduction="none", ignore_index=IGNORED)
        return torch.func.vmap(one)(answer, *targets)

    def why_no_mean(self) -> str | None:
        """Why the loss is not known to be the mean of the losses of the samples; None if it is.

        It is tried on random numbers in the shapes of the answer and the targets.
        """
        if self.averages_classes:
            return None if value(self.answer).dim() == 2 else "there is a target for each position of a sample"
        if not all(isinstance(value(t), torch.Tensor) and value(t).dim() for t in self.targets):
            return "a target has no batch dimension"
        generator = torch.Generator().manual_seed(0)

        def example(node: fx.Node) -> torch.Tensor:
            val = value(node)
            shape = [hint(size) for size in val.shape]
            if is_float(node):
                return torch.rand(shape, generator=generator, dtype=torch.float64).to(val.dtype)
            return torch.randint(0, 2, shape, generator=generator).to(val.dtype)

        values = [example(node) for node in self.inputs]
        try:
            whole, each = self.loss(*values), self.losses(*values)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"it cannot be taken of one sample ({str(error).splitlines()[0]})"
        if torch.allclose(whole.double(), each.double().mean(), rtol=1e-4):
            return None
        return "it is no mean over samples"
