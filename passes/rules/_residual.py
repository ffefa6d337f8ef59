"""Residual paths, found on the graph: where a skip runs past a branch, and the points between sublayers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from graphrewrite.graph.aliasing import is_view
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import flat_inputs, info, is_backward, is_float, is_getitem, producer
from graphrewrite.graph.ops import ACTIVATIONS, ATTENTIONS, CONVOLUTIONS, MATMULS, NORMALISATIONS, is_pointwise

aten = torch.ops.aten
ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})
HEAVY = MATMULS | CONVOLUTIONS | ATTENTIONS
"""The operators a residual branch is made of and a skip goes around."""
_COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten._to_copy.default})


class Paths:
    """The activations of one block: for each, the least number of heavy operators between it and the block's inputs."""

    def __init__(self, graph: JointGraph, block: str, is_active: Callable[[fx.Node], bool]) -> None:
        """Args: `is_active` tells activations that require grad from weights, masks and constants."""
        self.block = block
        self._is_active = is_active
        self.nodes = [n for n in graph.forward_nodes() if info(n).block == block and not info(n).copy]
        self.cost: dict[fx.Node, int] = {}
        for node in self.nodes:
            found = [self.of(source) for source in self.sources(node)]
            if found:
                self.cost[node] = min(found) + (producer(node) is node and node.target in HEAVY)

    def of(self, value: fx.Node) -> int:
        """The count for a value that an operator of the block reads; 0 for what comes from outside."""
        return self.cost.get(value, 0)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The activations an operator reads."""
        return [s for s in dict.fromkeys(flat_inputs(node)) if self.carries(s)]

    def carries(self, node: fx.Node) -> bool:
        """Whether a value is an activation (or a tuple of them) that requires grad."""
        own = node.op == "call_function" and info(node).block == self.block and producer(node) is node
        return node in self.cost if own and not is_float(node) else self._is_active(node)

    def skip_of(self, node: fx.Node) -> fx.Node | None:
        """The skipped input of a residual sum: the summand with fewer heavy operators behind it; None for others."""
        if node.target not in ADDITIONS:
            return None
        sources = self.sources(node)
        if len(sources) != 2 or self.of(sources[0]) == self.of(sources[1]):
            return None
        return min(sources, key=self.of)


def active(graph: JointGraph) -> Callable[[fx.Node], bool]:
    """A test for activations: values with samples in them that require grad."""
    table = graph.backward
    assert table is not None

    def test(node: fx.Node) -> bool:
        if node.op != "call_function" or is_backward(node) or not is_float(node):
            return False
        return table.requires_grad(node) and not table.is_weightlike(node)

    return test


def sublayer_points(graph: JointGraph, block: str) -> list[fx.Node]:
    """The values between the sublayers of a block, in order, the block's own boundaries left out.

    These are the residual sums (a normalisation that alone reads the sum belongs to it, as in post-norm transformers)
    and the activations of feed-forward sublayers: what a linear or convolution reads, computed element by element
    from another one's result. A block that applies one weight several times is recurrent and has no sublayers.
    """
    is_active = active(graph)
    paths = Paths(graph, block, is_active)
    if _is_recurrent(graph, paths):
        return []
    boundaries = set(graph.boundaries(block))
    sums = {_past_norm(n) for n in paths.nodes if paths.skip_of(n) is not None}
    points = {point: None for node in paths.nodes for point in _points_at(node, paths, sums)}
    before = _before_heavy(paths)
    return [n for n in paths.nodes if n in points and n in before and n not in boundaries]


def _before_heavy(paths: Paths) -> set[fx.Node]:
    """The values of a block that a heavy operator of it depends on."""
    found: set[fx.Node] = set()
    for node in reversed(paths.nodes):
        if node in found or node.target in HEAVY:
            found.update(node.all_input_nodes)
    return found


def _points_at(node: fx.Node, paths: Paths, sums: set[fx.Node]) -> list[fx.Node]:
    found = [node] if node in sums else []
    if node.target in MATMULS | CONVOLUTIONS and len(paths.sources(node)) == 1:
        read = paths.sources(node)[0]
        while (is_view(read) or read.target in _COPIES) and isinstance(read.args[0], fx.Node):
            read = read.args[0]
        if read not in sums and _is_activation(read, paths):
            found.append(read)
    return found


def _is_activation(node: fx.Node, paths: Paths) -> bool:
    """Whether a value is computed element by element, through a non-linearity, from linear maps inside the block."""
    seen: set[fx.Node] = set()
    stack, bent = [node], False
    while stack:
        current = stack.pop()
        op = producer(current)
        if current in seen:
            continue
        seen.add(current)
        if op.op != "call_function" or info(op).block != paths.block:
            return False
        if op.target in HEAVY | NORMALISATIONS:
            continue
        if not (is_pointwise(op) or is_view(op) or is_getitem(current)) or paths.skip_of(op) is not None:
            return False
        bent = bent or op.target in ACTIVATIONS
        stack += paths.sources(op)
    return bent


def _past_norm(node: fx.Node) -> fx.Node:
    readers = [u for u in node.users if not is_backward(u)]
    if len(readers) == 1 and readers[0].target in NORMALISATIONS and is_float(readers[0]):
        return readers[0]
    return node


def _is_recurrent(graph: JointGraph, paths: Paths) -> bool:
    weights = graph.parameters().values()
    inside = set(paths.nodes)
    return any(sum(u in inside and u.target in HEAVY for u in weight.users) > 1 for weight in weights)
