"""Batch normalisation in training mode does not read running statistics in its backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.patterns import Failure, Match, PatternPass, fail, op

aten = torch.ops.aten

# operator -> (positions of running mean and variance, position of the training flag or None when always training)
_BACKWARDS: dict[object, tuple[tuple[int, int], int | None]] = {
    aten.native_batch_norm_backward.default: ((3, 4), 7),
    aten.cudnn_batch_norm_backward.default: ((3, 4), None),
    aten.miopen_batch_norm_backward.default: ((3, 4), None),
    aten.batch_norm_backward.default: ((3, 4), 7),
}


@dataclass(frozen=True)
class DropUnreadStatistics(PatternPass):
    """Pass None for running statistics to batch-norm backwards in training mode, which do not read them.

    Else the buffers, which the forward updates, would have to be kept in their old state for the backward.
    """

    name = "drop_unread_statistics"
    level = "aten"
    preserves_numerics = True
    summary = "batch-norm backwards in training mode get no running statistics"
    pattern = op(_BACKWARDS)

    def check(self, graph: JointGraph, match: Match) -> Failure | None:
        """Training mode, and statistics that could be dropped."""
        node = match.root
        positions, flag = _BACKWARDS[node.target]
        if flag is not None and node.args[flag] is not True:
            return fail("in evaluation mode: its backward reads the running statistics")
        if all(not isinstance(node.args[p], fx.Node) for p in positions):
            return fail("it gets no running statistics as it is")
        return None

    def rewrite(self, graph: JointGraph, match: Match) -> fx.Node | None:
        """Replace the arguments."""
        positions, _ = _BACKWARDS[match.root.target]
        match.root.args = tuple(None if i in positions else arg for i, arg in enumerate(match.root.args))
        return None
