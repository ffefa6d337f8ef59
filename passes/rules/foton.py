"""FOTON: a second forward pass on the input minus the error, carried back by the transposed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.rules._feedback_weights import same_on_all_ranks
from graphrewrite.passes.rules._forward_forward import pass_info
from graphrewrite.passes.rules._second_pass import SecondPass
from graphrewrite.passes.rules._task import Task
from torch import fx

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Param,
    Role,
    flat_inputs,
    info,
    is_float,
    outputs_of,
    producer,
    spec_of,
    value,
)
from graphrewrite.graph.ops import ACTIVATIONS, CONVOLUTIONS, MATMULS, is_random

aten = torch.ops.aten


@dataclass(frozen=True)
class Foton(SecondPass):
    """Cut every boundary between blocks; run the model again on x' = x - F e; teach by the difference of the passes.

    F = (W_L ... W_1)^T with the weights as they are in this step: e, the error at the output per sample, is carried
    back to the input by the operators' own derivatives, non-linearities and dropout left out. On a linear network
    whose weights have orthonormal rows this is backpropagation. Apart from F, the learning rule is `pepita`'s with
    the clean presynaptic term; means are over samples and, for maps and sequences, over positions.

    After each optimizer step the weights of linear maps and convolutions are orthonormalised by Bjorck's iteration:
    W <- W / sigma_max, then W <- 3/2 W - 1/2 W W^T W. It happens when the next call starts, or at `state_dict()`; the
    first training call does it to the weights that it finds.

    Args:
        presynaptic: `"clean"` as in the paper, or `"modulated"`.
        iterations: Steps of Bjorck's iteration; 0: weights are left as the optimizer makes them.
        power: Steps of the power iteration that finds the largest singular value.
    """

    presynaptic: Literal["clean", "modulated"] = "clean"
    iterations: int = 20
    power: int = 10

    name = "foton"
    summary = "FOTON: the error, carried to the input by the transposed weights, changes a second forward pass"
    formula = "x' = x − F e, Fᵀ = W_L … W_1;  G_l = (h_l − h'_l) h_{l−1}ᵀ;  W ← orthonormalise(W)"
    paper = "FOTON: Fully forward learning by orthonormal networks, arXiv 2512.20668, 2025"

    @property
    def trains_feedback(self) -> bool:  # type: ignore[override]
        """The orthonormalisation is a phase between steps."""
        return self.iterations > 0

    @property
    def feedback_interval(self) -> int:
        """In front of every call."""
        return int(self.iterations > 0)

    def requires(self, graph: JointGraph) -> None:
        """Counts that are counts, on top of what every second pass needs."""
        if self.iterations < 0 or self.power < 1:
            raise RuleError(
                f"foton{{iterations={self.iterations},power={self.power}}} cannot orthonormalise",
                remedy="use iterations=20 (0 leaves the weights alone) and power=10",
            )
        super().requires(graph)

    # --- the error at the input ------------------------------------------------------------------------------------

    def modulated(self, graph: JointGraph, x: fx.Node, task: Task) -> fx.Node:
        """X - F e."""
        error = task.error_node(graph)
        carried = self._carried(graph, task.answer, error, x)
        if carried is None:
            raise RuleError(
                "no path of operators that can be differentiated leads from the model's input to its answer",
                node=x.name,
                remedy="use pepita, whose feedback is a matrix of its own",
            )
        made: fx.Node = graph.splice(lambda x, back: x.detach() - back, [x, carried], like=pass_info(graph, self.name))
        return made

    @staticmethod
    def _carried(graph: JointGraph, answer: fx.Node, error: fx.Node, x: fx.Node) -> fx.Node | None:
        """The error pulled back from the answer to the input, non-linearities left out."""
        table = graph.table
        leaf = x in graph.leaves
        last = graph.output_node.prev
        if not leaf:
            graph.leaves[x] = None
            table.invalidate(x)
        arrived: dict[fx.Node, fx.Node] = {answer: error}

        def arrive(node: fx.Node, cotangent: fx.Node) -> None:
            if node in arrived:
                like = info(cotangent).but(role=Role.ACCUMULATE)
                cotangent = graph.emit(aten.add.Tensor, (arrived[node], cotangent), like=like)
            arrived[node] = cotangent

        for op in reversed(graph.forward_nodes()):
            if info(op).copy or info(op).role is not Role.FORWARD or producer(op) is not op:
                continue
            given = {node: arrived[node] for node in outputs_of(op).values() if node in arrived}
            if not given or not table.requires_grad(op):
                continue
            straight = _passed_on(graph, op)
            if straight is not None:
                arrive(straight, given[op])
                continue
            for node, cotangents in graph.pull_back(op, given).items():
                for cotangent in cotangents:
                    arrive(node, cotangent)
        if not leaf:
            del graph.leaves[x]
            table.invalidate(x)
        # all of it hangs on the forward alone
        node = last.next
        while node is not graph.output_node:
            node.meta["gr"] = info(node).but(stage="forward")
            node = node.next
        return arrived.get(x)

    # --- after the optimizer step ----------------------------------------------------------------------------------

    def rewrite_feedback(self, graph: JointGraph) -> None:
        """Orthonormalise every matrix and kernel of this rule's blocks."""
        counter = graph.counter()
        for node in weights(graph):
            spec, stream = spec_of(node), graph.stream()
            assert isinstance(spec, Param)

            def update(weight: torch.Tensor, counter: torch.Tensor, stream: int = stream) -> torch.Tensor:
                return orthonormalised(weight, same_on_all_ranks(counter), stream, self.iterations, self.power)

            graph.update_parameter(spec.name, update, [counter])


def _passed_on(graph: JointGraph, op: fx.Node) -> fx.Node | None:
    """What a non-linearity or a dropout mask lets the error through to unchanged; None for other operators."""
    inputs = [n for n in flat_inputs(op) if is_float(n) and graph.table.requires_grad(n)]
    if op.target in ACTIVATIONS and len(inputs) == 1:
        return inputs[0]
    if op.target is aten.mul.Tensor and len(inputs) == 1:
        masks = [n for n in flat_inputs(op) if n is not inputs[0]]
        if masks and all(_is_mask(n) for n in masks):
            return inputs[0]
    return None


def _is_mask(node: fx.Node) -> bool:
    while node.op == "call_function" and not is_random(node) and node.target in (aten.div.Scalar, aten.div.Tensor):
        node = node.args[0]  # type: ignore[assignment]
    return is_random(node)


def weights(graph: JointGraph) -> list[fx.Node]:
    """The parameters that linear maps and convolutions of the running rule's blocks are made of, each once."""
    own = {block.name for block in graph.rule_blocks()}
    found: dict[fx.Node, None] = {}
    for op in graph.forward_nodes():
        if op.target in MATMULS | CONVOLUTIONS and info(op).block in own and info(op).block != LOSS_BLOCK:
            for node in flat_inputs(op):
                if isinstance(spec_of(node), Param) and value(node).dim() > 1 and node in graph.leaves:
                    found[node] = None
    return list(found)


def orthonormalised(
    weight: torch.Tensor, counter: torch.Tensor, stream: int, iterations: int, power: int
) -> torch.Tensor:
    """The weight with orthonormal rows (columns, if it has fewer of them); kernels count as (outputs, rest) matrices.

    Args:
        weight: Two dimensions or more.
        counter: The (seed, step, rank) triple.
        stream: Random stream of the power iteration's start.
        iterations: Steps of Bjorck's iteration of order 1.
        power: Steps of the power iteration.
    """
    matrix = weight.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.t()
    start = random.normal(counter, stream, [matrix.shape[0], 1], matrix.dtype)
    for _ in range(power):
        start = matrix @ (matrix.t() @ start)
        start = start / start.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    matrix = matrix / (matrix.t() @ start).norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    for _ in range(iterations):
        matrix = 1.5 * matrix - 0.5 * (matrix @ matrix.t()) @ matrix
    made: torch.Tensor = (matrix if wide else matrix.t()).reshape(weight.shape)
    return made
