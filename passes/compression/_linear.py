"""Linear layers in a graph: products of an activation and a weight, in whatever form the model writes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphrewrite.graph.differentiate import Pullback
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import flat_inputs, is_backward, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b.

    Attributes:
        op: The operator.
        x: What it reads.
        weight: Position of the weight among the operator's inputs.
        bias: Position of the bias, -1 without.
        rows_first: Whether the weight is stored as (out, in); else as (in, out).
    """

    op: fx.Node
    x: fx.Node
    weight: int
    bias: int
    rows_first: bool

    @staticmethod
    def of(graph: JointGraph, op: fx.Node) -> Linear | None:
        """The linear layer that an operator is; None if it is none."""
        inputs = flat_inputs(op)
        if op.kwargs or is_backward(op):
            return None
        if op.target is aten.linear.default:
            found = Linear(op, inputs[0], 1, 2 if len(inputs) > 2 else -1, True)
        elif op.target is aten.addmm.default and value(inputs[0]).dim() == 1:
            found = Linear(op, inputs[1], 2, 0, False)
        elif op.target is aten.mm.default:
            found = Linear(op, inputs[0], 1, -1, False)
        else:
            return None
        weight = inputs[found.weight]
        if value(weight).dim() != 2 or weight is found.x or not graph.table.is_weightlike(weight):
            return None
        return None if graph.table.is_weightlike(found.x) else found

    def row(self, graph: JointGraph) -> Pullback | None:
        """The row that computes the weight's gradient; None if nothing does."""
        for row in graph.table.rows(self.op):
            if row.part == "w" and self.weight in row.active:
                return row
        return None

    def gradients(
        self, row: Pullback, rows: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """What `bwd` returns for the row.

        Args:
            row: The row.
            rows: The output's cotangent with its leading dimensions in one.
            weight: The weight's gradient, (out, in).
        """
        made: list[torch.Tensor | None] = []
        for position in row.wrt:
            if position == self.weight:
                made.append(weight if self.rows_first else weight.t())
            elif position == self.bias:
                made.append(rows.sum(0))
            else:
                made.append(None)
        return tuple(made)


def find_linears(graph: JointGraph) -> list[Linear]:
    """The linear layers of the forward whose weight has a gradient."""
    found = []
    for node in graph.forward_nodes():
        linear = Linear.of(graph, node)
        if linear is not None and linear.row(graph) is not None:
            found.append(linear)
    return found


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """All dimensions but the last in one."""
    return tensor.reshape(tensor.numel() // tensor.shape[-1], tensor.shape[-1]) if tensor.dim() != 2 else tensor
