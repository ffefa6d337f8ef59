"""Direct random target projection: every block gets the targets through a fixed random matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from graphrewrite.passes.rules._feedback import Injection, ProjectedSignal, output_errors
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Target, hint, is_float, value


@dataclass(frozen=True)
class DirectRandomTargetProjection(ProjectedSignal):
    """Redirect the cotangent at every boundary between blocks: delta_l = -y B_l, y being the targets, one-hot.

    It is DFA with the answer left out of the error: p - y becomes -y, whose sign is the error's. The signal is known
    before the forward, so a hidden block waits for nothing behind it: its backward runs right after its forward. The
    last block is trained by the exact gradient of the task loss.

    The signal is the per-sample one: unlike the cotangent of a mean loss it holds no 1/batch, only the factor with
    which the loss is scaled (`(loss / n).backward()`, a `GradScaler`). Floating-point targets of the output's shape
    are projected as they are; ignored integer targets (negative ones) send no signal.

    Its options are those of `ProjectedSignal`.
    """

    name = "drtp"
    summary = "direct random target projection: the targets through fixed random matrices"
    formula = "δ_l = (−y B_l) ⊙ φ'(z_l)"
    paper = "Frenkel, Lefebvre, Bol: Learning without feedback: fixed random learning signals, 2021"
    needs_loss = True
    early_backward = True

    def sources(self, graph: JointGraph) -> list[fx.Node]:
        """The model's outputs: the targets have their shape, or that without the classes."""
        return [output for output, _ in output_errors(graph)[:1]]

    def signal(self, graph: JointGraph, one: Injection) -> tuple[Callable[..., torch.Tensor], list[fx.Node]]:
        """The targets, projected; integer targets only select rows, without a product."""
        targets = self._targets(graph, one.source)
        projection = one.projection
        classes = not is_float(targets)

        def project(weight: torch.Tensor, like: torch.Tensor, y: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
            weight = weight[:, : projection.features]
            found = projection.lookup(y, weight, like) if classes else projection(y, weight, like)
            return found * -tangent

        return project, [targets, graph.loss_tangent(value(one.boundary).dtype)]

    def _targets(self, graph: JointGraph, output: fx.Node) -> fx.Node:
        shape = [hint(size) for size in value(output).shape]
        found = [node for spec, node in graph.inputs.items() if isinstance(spec, Target)]
        if len(found) == 1:
            y = value(found[0])
            if not isinstance(y, torch.Tensor):
                raise RuleError("drtp needs a tensor of targets")
            sizes = [hint(size) for size in y.shape]
            if sizes == (shape if is_float(found[0]) else shape[:-1]):
                return found[0]
            got = f"{y.dtype} {tuple(y.shape)}"
        else:
            got = f"{len(found)} target tensors"
        raise RuleError(
            f"drtp projects one target per output {tuple(value(output).shape)}, got {got}",
            remedy="integer classes of the output's shape without its last dimension, or floats of the output's shape",
        )
