"""Which nodes of a backward can wait for its weight stage: weight gradients, and what only they read or feed.

Only the ATen-level graph is looked at. A node waits iff no input cotangent needs it. Gradients that one kernel
computes together with an input cotangent (normalisations), or that were computed in the forward, cannot wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx as nx
import torch
from torch import fx

from graphrewrite.analysis.cost import flops
from graphrewrite.analysis.recomputation import is_costly
from graphrewrite.errors import RuleError
from graphrewrite.graph.aliasing import base_of, mutated_bases, owns_no_memory
from graphrewrite.graph.nodes import (
    Grad,
    Param,
    Role,
    State,
    Tangent,
    UserInput,
    ancestors,
    info,
    nbytes,
    spec_of,
    value,
)
from graphrewrite.graph.ops import NORMALISATIONS, is_impure
from graphrewrite.graph.partition import stages_of
from graphrewrite.graph.text import operator_name

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph

_TRIES = 16
"""How closely the price of repeated work is searched for."""


@dataclass(frozen=True)
class Split:
    """The weight stage of a backward.

    Attributes:
        nodes: What runs in it.
        again: What runs in both stages, since holding it would take more bytes than what it is computed of.
        kept: Gradients that stay in the first stage, with the reason.
    """

    nodes: dict[fx.Node, None]
    again: dict[fx.Node, None]
    kept: dict[Param | State, str]


def find_weight_stage(graph: JointGraph, budget: float | None = None) -> Split:
    """Tell which nodes can wait.

    Args:
        graph: ATen level.
        budget: What may be held: bytes, or a fraction of what would be; None: nothing costly is repeated for it.

    Raises:
        RuleError: However much is computed again, more than the budget would be held.
    """
    stages = stages_of(graph)
    backward = [n for n in graph.nodes if stages.get(n) == "backward"]
    inside = set(backward)
    needed = ancestors((n for spec, n in graph.outputs.items() if _first(spec)), inside)
    needed |= ancestors((n for n in backward if is_impure(n)), inside)
    waiting = _downstream([n for n in backward if _is_gradient(n) and n not in needed], backward)
    while torn := _torn(waiting, backward):
        needed |= ancestors(torn, inside)
        waiting = _downstream([n for n in waiting if _is_gradient(n) and n not in needed], backward)
    again = _Placing(graph, backward, waiting).chosen(budget) if waiting else {}
    order = {node: None for node in graph.nodes if node in waiting}
    kept = {
        spec.of: _reason(node, stages)
        for spec, node in graph.outputs.items()
        if isinstance(spec, Grad) and isinstance(spec.of, (Param, State))
        if node not in order and stages.get(node) != "weight"
    }
    return Split(order, again, kept)


def _first(spec: object) -> bool:
    """Whether an output is wanted of the first stage."""
    return isinstance(spec, Grad) and isinstance(spec.of, UserInput)


def _is_gradient(node: fx.Node) -> bool:
    own = info(node)
    return own.role is Role.GRADIENT and not own.scales


def _downstream(seeds: Iterable[fx.Node], order: Iterable[fx.Node]) -> dict[fx.Node, None]:
    found = dict.fromkeys(seeds)
    for node in order:
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return found


def _torn(waiting: dict[fx.Node, None], backward: list[fx.Node]) -> list[fx.Node]:
    """Nodes of the weight stage that write, in place, to memory that the first stage uses, or read such memory."""
    written = mutated_bases(backward)
    if not written:
        return []
    shared = {base_of(n) for n in backward if n not in waiting} | {
        base_of(s) for n in backward if n not in waiting for s in n.all_input_nodes
    }
    torn = written & shared
    return [n for n in waiting if any(base_of(m) in torn for m in (n, *n.all_input_nodes))]


class _Placing:
    """Chooses what is held between the stages: a minimum cut, in bytes.

    What the backward computes of forward values alone (a decoded or recomputed activation) may be computed in the
    weight stage instead of being held. Products are not repeated for it, and cotangents stay where they are: they are
    what the first stage is for. Under a budget both are repeated, at a price: bytes plus price times work is minimised,
    for the highest price that keeps the budget.
    """

    def __init__(self, graph: JointGraph, backward: list[fx.Node], waiting: dict[fx.Node, None]) -> None:
        self._backward, self._waiting = backward, waiting
        self._inside, self._kept = set(backward), set(graph.outputs.values())
        tangents = [n for n in graph.nodes if isinstance(spec_of(n) if n.op == "placeholder" else None, Tangent)]
        self._cotangents, self._mutated = _downstream(tangents, backward), mutated_bases(backward)
        # equal layers are not all repeated at the same price: a budget between none and all of them can be met
        self._lean = {node: 1 + 0.1 * i / len(backward) for i, node in enumerate(backward)}

    def chosen(self, budget: float | None) -> dict[fx.Node, None]:
        """What both stages compute; what only the weight stage reads is added to what waits."""
        reached, held = self._cut(None)
        if budget is not None:
            allowed = budget * held if isinstance(budget, float) else budget
            if held > allowed:
                reached = self._within(allowed, held)
        again: dict[fx.Node, None] = {}
        for node in reversed(self._backward):
            if node not in reached:
                continue
            if node not in self._kept and all(user in self._waiting for user in node.users):
                self._waiting[node] = None
            else:
                again[node] = None
        return dict.fromkeys(n for n in self._backward if n in again)

    def _within(self, allowed: float, held: int) -> set[fx.Node]:
        """The cut with the least work that holds no more than this."""
        best, least = self._cut(0.0)
        if least > allowed:
            raise RuleError(
                f"the split's budget allows {int(allowed):,} bytes between the stages of the backward, but the lowest "
                f"feasible is {least:,} ({held:,} without a budget)",
                remedy="raise the budget; compress=, or memory_budget= let the weight stage compute more again",
            )
        # bytes that one unit of work must save: what is held never falls as the price rises
        low, high = 2.0**-40, 2.0**10
        for _ in range(_TRIES):
            price = (low * high) ** 0.5
            reached, taken = self._cut(price)
            if taken <= allowed:
                best, low = reached, price
            else:
                high = price
        return best

    def _free(self, node: fx.Node, price: float | None) -> bool:
        if node not in self._inside or is_impure(node) or base_of(node) in self._mutated:
            return False
        if price is None:
            return node not in self._cotangents and not flops(node)
        return bool(flops(node)) or not is_costly(node)

    def _cut(self, price: float | None) -> tuple[set[fx.Node], int]:
        """What to compute again, and the bytes that are held then.

        The network runs from the readers to what they read, so that of equal cuts the one with the least to compute
        again is found.
        """
        flow = nx.DiGraph()
        flow.add_nodes_from(["readers", "held"])
        stack = list(dict.fromkeys(s for n in self._waiting for s in n.all_input_nodes if s not in self._waiting))
        for node in stack:
            flow.add_edge("readers", (node, "out"))
        seen = set(stack)
        while stack:
            node = stack.pop()
            may = self._free(node, price) and node.op == "call_function"
            if may and (owns_no_memory(node) or isinstance(value(node), (tuple, list))):
                flow.add_edge((node, "out"), (node, "in"))
            else:
                flow.add_edge((node, "out"), (node, "in"), capacity=_cost(node))
            if not may:
                flow.add_edge((node, "in"), "held")
                continue
            flow.add_node((node, "in"))
            if price and not owns_no_memory(node):
                flow.add_edge((node, "in"), "held", capacity=price * self._lean[node] * _work(node))
            for source in node.all_input_nodes:
                flow.add_edge((node, "in"), (source, "out"))
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        _, (reached, _) = nx.minimum_cut(flow, "readers", "held")
        again = {node for node in seen if (node, "in") in reached and self._free(node, price)}
        held = {base_of(node): _cost(node) for node in seen if (node, "out") in reached and (node, "in") not in reached}
        return again, sum(held.values())


def _work(node: fx.Node) -> int:
    """What computing a node again costs, in operations: its own, and those that its bytes stand for."""
    return flops(node) + 4 * nbytes(value(node))


def _cost(node: fx.Node) -> int:
    """Bytes of holding a value; inputs, parameters and sizes are there anyway."""
    base = base_of(node)
    if (base.op == "placeholder" and not isinstance(spec_of(base), Tangent)) or isinstance(value(node), torch.SymInt):
        return 0
    return nbytes(value(base))


def _reason(node: fx.Node, stages: Mapping[fx.Node, str]) -> str:
    """Why a gradient is there in the first stage."""
    if info(node).scales or stages.get(node) == "forward":
        return "it is computed in the forward, right behind its block"
    if spec_of(node) is not None:
        return "it is handed in"
    if is_impure(node):
        return "it is computed by a random or in-place operator, which keeps its place"
    mirror = node.meta.get("mirrors")
    if mirror is None:
        return "the rule computes it together with other values of the first stage"
    name = operator_name(mirror)
    if mirror.target in NORMALISATIONS:
        return f"{name} computes it together with its input's cotangent, in one kernel"
    return f"the derivative of {name} is not separable: its input's cotangent and this gradient are computed together"
