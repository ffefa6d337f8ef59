"""Fold views: chains of transposes, reshapes and detaches that cancel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import value
from graphrewrite.graph.text import operator_name
from graphrewrite.pipeline import Pass, PassResult

aten = torch.ops.aten

_DETACHES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_FOLDABLE = {aten.t.default, aten.transpose.int, aten.permute.default, aten.expand.default, aten.slice.Tensor}
_END = 9223372036854775807


@dataclass(frozen=True)
class FoldViews(Pass):
    """Drop `detach`, make `view` a `reshape`, and remove views that change nothing.

    `view` becomes `reshape` because at run time a cotangent or a channels-last input may have other strides than the
    example; where the strides allow it, `reshape` is the same view.
    """

    name = "fold_views"
    level = "aten"
    preserves_numerics = True
    summary = "drop detaches, fold transposes and reshapes that cancel, make view a reshape"

    def run(self, graph: JointGraph) -> PassResult:
        """One walk in order: what a node reads is folded before it."""
        modified = False
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _VIEWS and node.target is not aten.reshape.default:
                node.target = aten.reshape.default
                modified = True
            same = self._try_fold(node)
            if same is not None:
                graph.substitute(node, same)
                modified = True
            elif node.target in _FOLDABLE and isinstance(node.args[0], fx.Node) and node.args[0].target is node.target:
                self.fail(graph, f"{operator_name(node)} of {operator_name(node)}, but the two do not cancel", node)
        return PassResult(graph, modified)

    def _try_fold(self, node: fx.Node) -> fx.Node | None:
        """The existing node that a view is equal to; None if there is none."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        if node.target in _DETACHES:
            return source
        if node.target is aten.t.default and source.target is aten.t.default:
            return _first(source)
        if node.target is aten.transpose.int and source.target is aten.transpose.int:
            rank = value(node).dim()
            if {d % rank for d in node.args[1:]} == {d % rank for d in source.args[1:]}:
                return _first(source)
        if node.target is aten.permute.default and source.target is aten.permute.default:
            inner, outer = source.args[1], node.args[1]
            if [inner[i] for i in outer] == list(range(len(outer))):  # type: ignore[index,union-attr,arg-type]
                return _first(source)
        if node.target is aten.reshape.default:
            if source.target is aten.reshape.default:
                node.args = (_first(source), node.args[1])
                source = _first(source)
            if _same_shape(node, source):
                return source
        if node.target is aten.expand.default and _same_shape(node, source):
            return source
        if node.target is aten.slice.Tensor and _whole_slice(node):
            return source
        return None


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Equal shapes as written: symbolic sizes are compared as expressions, so no guard is added."""
    left, right = value(a).shape, value(b).shape
    return len(left) == len(right) and all(str(x) == str(y) for x, y in zip(left, right, strict=True))


def _whole_slice(node: fx.Node) -> bool:
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    given = (*node.args, *defaults[len(node.args) :])
    _, _, start, end, step = given
    return start in (0, None) and end in (None, _END) and step == 1
