"""Execution orders of a stage, and the bytes they keep alive."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphrewrite.graph.aliasing import base_of, mutated_bases, owns_no_memory
from graphrewrite.graph.loop import LoopCall, is_loop
from graphrewrite.graph.nodes import LOSS_BLOCK, info, is_getitem, nbytes, value
from graphrewrite.graph.ops import is_impure

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph


def cheapest_order(
    graph: JointGraph,
    nodes: list[fx.Node],
    results: Sequence[fx.Node],
    given: Sequence[fx.Node] = (),
    *,
    descending: bool = False,
    either: bool = False,
) -> list[fx.Node]:
    """The order with the lowest predicted peak: the one the nodes stand in, or block by block.

    Args:
        graph: The graph of the nodes.
        nodes: One stage, in a valid order.
        results: What stays alive to the end.
        given: Values handed in, which die after their last use.
        descending: Last block first, for a backward.
        either: Try the other direction, too: a backward that computes the forward again and passes nothing down is
            cheapest first block first.
    """
    others = [block_major_order(graph, nodes, descending=descending)]
    if either:
        others.append(block_major_order(graph, nodes, descending=not descending, loss_first=descending))
    others = [order for order in others if order != nodes]
    if not others:
        return nodes
    kept = {base_of(n) for n in results}
    # of equal ones the order as it is
    return min([nodes, *others], key=lambda order: max(live_bytes(order, kept, given), default=0))


def block_major_order(
    graph: JointGraph, nodes: Sequence[fx.Node], *, descending: bool = False, loss_first: bool = False
) -> list[fx.Node]:
    """All of a block (every forward pass, its loss, its backward) before anything of the next block.

    With local losses nothing of a block is read after it, so live memory does not grow with depth. Random operators
    keep their order within each forward pass; graphs with in-place operators keep theirs altogether.
    """
    if mutated_bases(nodes):
        return list(nodes)
    rank = {block.name: block.index for block in graph.blocks}
    rank[LOSS_BLOCK] = -1 if loss_first else len(rank)
    if descending:
        rank = {name: -index for name, index in rank.items()}
    inside = set(nodes)
    position = {node: i for i, node in enumerate(nodes)}
    after: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    waiting = dict.fromkeys(nodes, 0)
    last_impure: dict[str, fx.Node] = {}

    def constrain(first: fx.Node, second: fx.Node) -> None:
        after[first].append(second)
        waiting[second] += 1

    for node in nodes:
        for source in node.all_input_nodes:
            if source in inside:
                constrain(source, node)
        if is_impure(node):
            copy = info(node).copy
            if copy in last_impure:
                constrain(last_impure[copy], node)
            last_impure[copy] = node

    def key(node: fx.Node) -> tuple[int, int]:
        if isinstance(value(node), torch.SymInt):
            return -len(rank) - 1, position[node]  # a size belongs to no block: all may need it
        return rank.get(info(node).block, -len(rank)), position[node]

    heap = [(*key(n), n) for n in nodes if waiting[n] == 0]
    heapq.heapify(heap)
    order: list[fx.Node] = []
    while heap:
        node = heapq.heappop(heap)[-1]
        order.append(node)
        for user in after[node]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(heap, (*key(user), user))
    assert len(order) == len(nodes)
    return order


def live_bytes(nodes: Sequence[fx.Node], kept: set[fx.Node], given: Iterable[fx.Node] = ()) -> list[int]:
    """Bytes alive right after each node was computed, before anything is freed.

    Args:
        nodes: In execution order.
        kept: Owners of memory that stay alive to the end.
        given: Values handed in; they count from the start and die after their last use.
    """
    last_use: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last_use[base_of(source)] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for base, user in last_use.items():
        dying.setdefault(user, []).append(base)
    given = [n for n in given if n.op != "placeholder"]
    owned = {*nodes, *given}
    live, curve = sum(_size(n) for n in given), []
    for node in nodes:
        before = live
        live += _allocates(node)
        curve.append(max(live, before + _inside(node)))
        for base in dying.get(node, ()):
            if base in owned and base not in kept:
                live -= _size(base)
        if not node.users and node not in kept and not owns_no_memory(node):
            live -= _size(node)
    return curve


def _inside(node: fx.Node) -> int:
    """What a loop holds while it runs: the most that is alive in its body."""
    if not is_loop(node):
        return 0
    body = LoopCall.of(node).body
    return max(live_bytes(body.nodes, set(body.results)), default=0)


def _allocates(node: fx.Node) -> int:
    """An operator with several results makes them all at once, whether or not anything takes them out."""
    return 0 if owns_no_memory(node) or is_getitem(node) else nbytes(value(node))


def _size(base: fx.Node) -> int:
    """What is freed with a value; with a tuple the results that nothing takes out of it."""
    val = value(base)
    if not isinstance(val, (tuple, list)):
        return nbytes(val)
    taken = {user.args[1] for user in base.users if is_getitem(user)}
    return sum(nbytes(one) for i, one in enumerate(val) if i not in taken)
