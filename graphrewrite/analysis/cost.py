"""Floating-point operations, counted on the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils.flop_counter import flop_registry

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Role, hint, info, value
from graphrewrite.graph.text import operator_name


@dataclass(frozen=True)
class Cost:
    """Floating-point operations by role, at the example's sizes.

    Attributes:
        by_role: Role -> operations of its matrix products, convolutions and attentions.
        by_block: Block -> the same.
        by_operator: (role, operator) -> number of such nodes.
    """

    by_role: dict[str, int]
    by_block: dict[str, int]
    by_operator: dict[tuple[str, str], int]

    @property
    def total(self) -> int:
        """All operations of a step."""
        return sum(self.by_role.values())

    @property
    def backward(self) -> int:
        """Operations of cotangents, gradients and signals."""
        return self.total - self.by_role.get("forward", 0) - self.by_role.get("loss", 0)


def flops(node: fx.Node) -> int:
    """Floating-point operations of one ATen call; 0 for what is neither product, convolution nor attention."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return hint(flop_registry[packet](*args, **kwargs, out_val=value(node)))


def count(graph: JointGraph, nodes: Iterable[fx.Node] | None = None) -> Cost:
    """Count an ATen-level graph, or some of its nodes."""
    by_role: dict[str, int] = {}
    by_block: dict[str, int] = {}
    by_operator: dict[tuple[str, str], int] = {}
    for node in graph.nodes if nodes is None else nodes:
        work = flops(node)
        if not work:
            continue
        own = info(node)
        role = str(Role(own.role))
        by_role[role] = by_role.get(role, 0) + work
        by_block[own.block] = by_block.get(own.block, 0) + work
        key = (role, operator_name(node))
        by_operator[key] = by_operator.get(key, 0) + 1
    return Cost(by_role, by_block, by_operator)
