"""Compute equal things once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphrewrite.graph.aliasing import base_of, is_view, mutated_bases
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Param, info, is_backward, spec_of, value
from graphrewrite.graph.ops import is_impure
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge operators with equal targets and arguments, within a block.

    Across blocks only sizes and views of parameters are merged: what a certificate says, and when a block's memory
    is free, must not hang on a value that two blocks happen to compute alike. A backward operator is never merged
    into a forward one: its value would have to be saved in between. Random, mutating and mutated-through operators
    are left alone.
    """

    name = "eliminate_common_subexpressions"
    level = "aten"
    preserves_numerics = True
    summary = "merge operators with equal targets and arguments"

    def run(self, graph: JointGraph) -> PassResult:
        """Merge into the first occurrence, in order."""
        mutated = mutated_bases(graph.nodes)
        first: dict[Any, fx.Node] = {}
        anywhere: dict[Any, fx.Node] = {}
        modified = False
        for node in list(graph.nodes):
            if node.op != "call_function" or is_impure(node) or base_of(node) in mutated:
                continue
            key = _key(node)
            if key is None:
                continue
            kept = first.setdefault(key, node)
            if kept is not node:
                graph.substitute(node, kept)
                modified = True
                continue
            twin = anywhere.setdefault((key[0], *key[3:]), node)
            if twin is not node:
                self.fail(graph, f"equal to %{twin.name}, but {_apart(twin, node)}", node)
        return PassResult(graph, modified)


def _key(node: fx.Node) -> Any:
    try:
        key = (
            node.target,
            is_backward(node),
            "" if _shared(node) else info(node).block,
            _frozen(node.args),
            _frozen(node.kwargs),
        )
        hash(key)
    except TypeError:
        return None
    return key


def _apart(twin: fx.Node, node: fx.Node) -> str:
    """Why two equal operators are not merged."""
    if is_backward(twin) != is_backward(node):
        return "one is forward, the other backward: the value would have to be saved"
    return f"in another block ({info(twin).block or 'none'} and {info(node).block or 'none'}): blocks stay independent"


def _shared(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt) or (
        is_view(node) and isinstance(spec_of(base_of(node)) if base_of(node).op == "placeholder" else None, Param)
    )


def _frozen(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return (len(arg), *map(_frozen, arg))
    if isinstance(arg, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in arg.items()))
    if isinstance(arg, (bool, int, float)):
        return (type(arg), repr(arg))  # 1, 1.0 and True, and 0.0 and -0.0, are equal in Python, not to an operator
    return arg
