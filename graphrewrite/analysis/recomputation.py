"""Which forward values to compute again in the backward: by a minimum cut, or at the borders of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import networkx as nx
import torch
from torch import fx

from graphrewrite.analysis.cost import flops
from graphrewrite.graph.aliasing import base_of, mutated_bases, owns_no_memory
from graphrewrite.graph.nodes import LOSS_BLOCK, info, is_backward, nbytes, producer, runs_later, value
from graphrewrite.graph.ops import is_impure
from graphrewrite.graph.text import operator_name

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph

_COSTLY = ("scaled_dot_product", "linalg", "_fft", "cumsum", "cumprod", "sort", "topk", "_ctc", "native_batch_norm")


def repeatable(graph: JointGraph) -> set[fx.Node]:
    """Forward operators that give the same numbers when they run again: not random, and nothing writes to memory."""
    written = mutated_bases(graph.nodes)
    return {
        node
        for node in graph.nodes
        if node.op == "call_function"
        and not is_backward(node)
        and not is_impure(producer(node))
        and base_of(node) not in written
        and not any(base_of(source) in written for source in producer(node).all_input_nodes)
    }


def is_costly(node: fx.Node) -> bool:
    """Whether an operator is a product, convolution, attention or the like, which a cheap plan never repeats."""
    source = producer(node)
    return flops(source) > 0 or any(part in operator_name(source) for part in _COSTLY)


def minimum_cut(graph: JointGraph, price: Callable[[fx.Node], float] | None = None) -> set[fx.Node]:
    """What to repeat so that the least is saved, without repeating anything costly or random.

    The forward is a flow network: every value can be cut (saved) for its bytes; what cannot be repeated is a source,
    what the backward reads a sink. Inputs and parameters cost nothing. On the backward's side of a minimum cut
    everything is repeated.

    Args:
        graph: ATen level.
        price: Bytes that a value takes when it is saved; default: those of its elements. With the bytes of its
            encoding, the cut is aware of compression.
    """
    free = repeatable(graph)
    network = nx.DiGraph()
    price = price or (lambda node: nbytes(value(node)))
    forward = [n for n in graph.nodes if n.op == "call_function" and not runs_later(n)]
    inside = set(forward)
    network.add_node("source")
    network.add_node("sink")
    for node in forward:
        val = value(node)
        # what a schedule pass moved to the forward is not repeated either: a view of it can only be saved
        fixed = node not in free or is_costly(node)
        if isinstance(val, torch.Tensor) and (fixed or not owns_no_memory(node)):
            network.add_edge((node, 0), (node, 1), capacity=float(price(node)))
        elif isinstance(val, (torch.Tensor, tuple, list)):
            network.add_edge((node, 0), (node, 1))
        for source in node.all_input_nodes:
            if source in inside and not isinstance(value(source), (torch.SymInt, int)):
                network.add_edge((source, 1), (node, 0))
        if fixed:
            network.add_edge("source", (node, 0))
        if any(runs_later(user) for user in node.users):
            network.add_edge((node, 1), "sink")
    _, (kept, _) = nx.minimum_cut(network, "source", "sink")
    return {node for node in forward if node in free and not is_costly(node) and (node, 0) not in kept}


def inside_blocks(graph: JointGraph) -> set[fx.Node]:
    """What to repeat so that only values that cross from block to block are saved."""
    leaving = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node):
            continue
        others = (u for u in node.users if u.op == "output" or not is_backward(u))
        if any(u.op == "output" or info(u).block != info(node).block for u in others):
            leaving.add(base_of(node))
    return {node for node in repeatable(graph) if base_of(node) not in leaving and info(node).block != LOSS_BLOCK}
