"""PEPITA: a second forward pass, on the input plus the projected error; blocks learn from the difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.rules._feedback import Distribution, Projection, fill_feedback
from graphrewrite.passes.rules._forward_forward import known, pass_info
from graphrewrite.passes.rules._second_pass import SecondPass
from graphrewrite.passes.rules._task import Task
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import value


@dataclass(frozen=True)
class Pepita(SecondPass):
    """Cut every boundary between blocks; run the model again on x' = x + F e; teach by the difference of the passes.

    e is the error at the output per sample, F a fixed random matrix. Each block's last non-linearity turns z to h; the
    cotangent of z is (h - h') and everything in front of z inside the block has its exact derivative. Of a layer
    (`blocks="layers"`) that is the paper's (h - h') h'^T, in which the derivative of the non-linearity has no part.
    The gradients are means over samples and, for maps and sequences, over positions. The last block learns from the
    error of the modulated pass.

    Dropout masks and other noise are the same in both passes. Batch-norm normalises each pass by its own batch
    statistics; the running ones are updated by the clean pass alone.

    Args:
        presynaptic: The pass that weight gradients read their input from: `"modulated"` as in the paper, or `"clean"`:
            (h - h') h^T, and the last block learns from the clean pass.
        last: The error that the last block learns from, with the modulated presynaptic term: that of the
            `"modulated"` pass, or of the `"clean"` one (the paper's convolutional net).
        distribution: `"uniform"` or `"normal"` F.
        scale: F has the deviation of `scale` U(-s, s), s = sqrt(6 / n), n being the size of a sample.
    """

    last: Literal["clean", "modulated"] = "modulated"
    distribution: Distribution = "uniform"
    scale: float = 0.05

    name = "pepita"
    summary = "PEPITA: the error changes the input of a second forward pass"
    formula = "x' = x + F e;  G_l = (h_l − h'_l) h'_{l−1}ᵀ;  G_L = e' h'_{L−1}ᵀ"
    paper = "Dellaferrera, Kreiman: Error-driven Input Modulation: Solving the Credit Assignment Problem, 2022"

    def requires(self, graph: JointGraph) -> None:
        """Known options, on top of what every second pass needs."""
        known("last", self.last, ("clean", "modulated"))
        if not self.scale:
            raise RuleError("pepita with scale=0 changes no input: no block would learn", remedy="use scale=0.05")
        super().requires(graph)

    def modulated(self, graph: JointGraph, x: fx.Node, task: Task) -> fx.Node:
        """X + F e."""
        error = task.error_node(graph)
        projection = Projection.between(error, x, "dense", 0)
        weight = graph.add_state(
            self.state_name("feedback"),
            (projection.classes, projection.features),
            fill_feedback(self.distribution, self.scale * math.sqrt(6.0 / projection.features)),
            dtype=value(x).dtype,
        )

        def modulate(x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x.detach() + projection(error, weight, x)

        made: fx.Node = graph.splice(modulate, [x, error, weight], like=pass_info(graph, self.name))
        return made

    def seed_last(self, graph: JointGraph, task: Task, copies: dict[fx.Node, fx.Node]) -> None:
        """The last block's error: of the modulated pass, or the clean one at the modulated pass's output."""
        if self.last == "modulated":
            super().seed_last(graph, task, copies)
            return
        inputs = [task.share_node(graph), *task.inputs]
        graph.redirect(copies[task.answer], lambda share, *values: task.error(*values) * share, inputs)
