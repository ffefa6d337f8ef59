"""Batch normalisation in training mode does not read running statistics in its backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.pipeline import Pass, PassResult

aten = torch.ops.aten

# operator -> (positions of running mean and variance, position of the training flag or None when always training)
_BACKWARDS: dict[object, tuple[tuple[int, int], int | None]] = {
    aten.native_batch_norm_backward.default: ((3, 4), 7),
    aten.cudnn_batch_norm_backward.default: ((3, 4), None),
    aten.miopen_batch_norm_backward.default: ((3, 4), None),
    aten.batch_norm_backward.default: ((3, 4), 7),
}


@dataclass(frozen=True)
class DropUnreadStatistics(Pass):
    """Pass None for running statistics to batch-norm backwards in training mode, which do not read them.

    Else the buffers, which the forward updates, would have to be kept in their old state for the backward.
    """

    name = "drop_unread_statistics"
    level = "aten"
    preserves_numerics = True
    summary = "batch-norm backwards in training mode get no running statistics"

    def run(self, graph: JointGraph) -> PassResult:
        """Replace the arguments."""
        modified = False
        for node in graph.nodes:
            if node.op != "call_function" or node.target not in _BACKWARDS:
                continue
            positions, flag = _BACKWARDS[node.target]
            if flag is not None and node.args[flag] is not True:
                self.fail(graph, "in evaluation mode: its backward reads the running statistics", node)
                continue
            args = list(node.args)
            if all(not isinstance(args[p], fx.Node) for p in positions):
                self.fail(graph, "it gets no running statistics as it is", node)
                continue
            for p in positions:
                args[p] = None
            node.args = tuple(args)
            modified = True
        return PassResult(graph, modified)
