"""Put the two halves of a convolution's backward back into one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import is_getitem
from graphrewrite.pipeline import Pass, PassResult

_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_MASK = 10


@dataclass(frozen=True)
class MergeConvolutionBackward(Pass):
    """Merge `convolution_backward` calls with equal arguments and disjoint output masks.

    The split of `d_conv` and `w_conv` at the operator level makes two calls; where both are wanted in the same stage,
    one call does the same work with less overhead. Skipped when the backward itself is split.
    """

    name = "merge_convolution_backward"
    level = "aten"
    preserves_numerics = True
    summary = "one convolution_backward call for the input cotangent and the weight gradient"

    def run(self, graph: JointGraph) -> PassResult:
        """Merge into the earlier call."""
        first: dict[Any, fx.Node] = {}
        modified = False
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not _CONVOLUTION_BACKWARD:
                continue
            key = (*(tuple(a) if isinstance(a, list) else a for a in node.args[:_MASK]),)
            kept = first.setdefault(key, node)
            if kept is node:
                continue
            mine, theirs = list(kept.args[_MASK]), list(node.args[_MASK])  # type: ignore[arg-type]
            if any(a and b for a, b in zip(mine, theirs, strict=True)):
                self.fail(graph, f"computes what %{kept.name} computes as well", node)
                continue
            kept.args = (*kept.args[:_MASK], [a or b for a, b in zip(mine, theirs, strict=True)])
            kept.meta["val"] = tuple(
                a if mine[i] else b for i, (a, b) in enumerate(zip(kept.meta["val"], node.meta["val"], strict=True))
            )
            for unread in [u for u in (*kept.users, *node.users) if not u.users]:
                graph.graph.erase_node(unread)  # elements that a mask left out
            for user in list(node.users):
                assert is_getitem(user)
                user.replace_input_with(node, kept)
            graph.graph.erase_node(node)
            modified = True
        for node in first.values():
            mask = list(node.args[_MASK])  # type: ignore[arg-type]
            if not (mask[0] and mask[1]):
                self.fail(graph, "no other call differentiates this convolution at the same cotangent", node)
        if modified:
            graph.sort()
        return PassResult(graph, modified)
