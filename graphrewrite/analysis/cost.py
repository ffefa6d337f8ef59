"""Floating-point operations, counted on the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils.flop_counter import flop_registry

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.loop import LoopCall, is_loop
from graphrewrite.graph.nodes import Role, hint, info, value
from graphrewrite.graph.text import operator_name


@dataclass(frozen=True)
class Cost:
    """Floating-point operations by role, at the example's sizes.

    Attributes:
        by_role: Role -> operations of its matrix products, convolutions and attentions.
        by_block: Block -> the same.
        by_operator: (role, operator) -> how often such nodes run.
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
    """Floating-point operations of one ATen call; 0 for what is neither product, convolution nor attention.

    Those of a loop are those of its body, times its steps.
    """
    if is_loop(node):
        call = LoopCall.of(node)
        return call.steps * sum(flops(inner) for inner in call.body.nodes)
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
    for node, times in _calls(graph.nodes if nodes is None else nodes):
        work = times * flops(node)
        if not work:
            continue
        own = info(node)
        role = str(Role(own.role))
        by_role[role] = by_role.get(role, 0) + work
        by_block[own.block] = by_block.get(own.block, 0) + work
        key = (role, operator_name(node))
        by_operator[key] = by_operator.get(key, 0) + times
    return Cost(by_role, by_block, by_operator)


def _calls(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, int]]:
    """Each node with how often it runs; for a loop, the nodes of its body."""
    for node in nodes:
        if is_loop(node):
            call = LoopCall.of(node)
            yield from ((inner, call.steps * times) for inner, times in _calls(call.body.nodes))
        else:
            yield node, 1
