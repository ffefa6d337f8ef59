"""Weight gradients of several micro-batches as one: 2BP's concatenated second stage.

A weight gradient of a linear map is a product that sums over samples, so the sum over micro-batches is one product over
the samples of all of them. The weight graph is taken apart at such operators: what lies before them runs for each
micro-batch, their operands are concatenated along the samples, or, where that is faster, multiplied one after the other
into one result; what lies behind them (linear in the gradient) runs once. Gradients for which this cannot be shown are
computed for each micro-batch and added.

Rae, Lee, Richings 2024, https://arxiv.org/abs/2405.18047.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from graphrewrite._compat import boxed
from graphrewrite.graph.nodes import Buffer, Constant, OutputSpec, Param, State, info, value
from graphrewrite.graph.partition import Partition

if TYPE_CHECKING:
    from graphrewrite.runtime.two_stage import MicroBatch

aten = torch.ops.aten

_INTO: dict[Any, Any] = {aten.mm.default: aten.addmm_.default, aten.bmm.default: aten.baddbmm_.default}
"""Products, and the operators that add one to what is there."""

Kind = Literal["each", "same", "sum", "unknown"]
"""`each`: differs between micro-batches; `same`: does not; `sum`: adds up over micro-batches; `unknown`: none of it."""

Operand = tuple[fx.Node, int]
"""A value and the dimension along which its samples lie."""

_LINEAR = {
    operator.getitem,
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int),
    *(aten.permute.default, aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default),
    *(aten.neg.default, aten._to_copy.default, aten.expand.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.sum.dim_IntList, aten.sum.default, aten.slice.Tensor, aten.select.int),
    *(aten.slice_backward.default, aten.select_backward.default, aten.split.Tensor, aten.split_with_sizes.default),
}
"""Linear in their only tensor."""
_BILINEAR = {aten.mul.Tensor, aten.div.Tensor, aten.mm.default, aten.bmm.default}
_ADDITIVE = {aten.add.Tensor, aten.sub.Tensor, aten.cat.default}


class ConcatPlan:
    """How the weight stage of a partition runs for several micro-batches at once.

    Attributes:
        together: The results that one operator computes for all micro-batches.
        apart: The results that are computed for each and added.
    """

    def __init__(self, part: Partition) -> None:
        assert part.backward_weight is not None
        self.module = part.backward_weight
        self.nodes = [n for n in self.module.graph.nodes if n.op != "output"]
        self._placeholders = [n for n in self.nodes if n.op == "placeholder"]
        results: Sequence[fx.Node] = self.module.graph.output_node().args[0]  # type: ignore[assignment]
        self._reduced: dict[fx.Node, dict[int, Operand]] = {}
        self._kinds: dict[fx.Node, Kind] = {}
        for node in self.nodes:
            self._kinds[node] = self._kind(node)
        named = dict(zip(part.backward_weight_outputs, results, strict=True))
        self.together = {s: n for s, n in named.items() if self._kinds[n] == "sum"}
        self.apart = {s: n for s, n in named.items() if s not in self.together}
        self._late = self._behind(list(self.together.values()))
        self.operands = list(dict.fromkeys(o for n in self._late for o in self._reduced.get(n, {}).values()))
        late = set(self._late)
        self._shared = [
            p for p in self._placeholders if self._kinds[p] == "same" and any(user in late for user in p.users)
        ]
        early = self._before([node for node, _ in self.operands])
        self.prepare = excerpt(self.module, self._placeholders, early, [node for node, _ in self.operands])
        rest = self._before(list(self.apart.values()))
        self.rest = excerpt(self.module, self._placeholders, rest, list(self.apart.values()))
        self._finish: dict[int, Callable[[list[Any]], Sequence[Any]]] = {}

    # --- telling what adds up ----------------------------------------------------------------------------------------

    def _kind(self, node: fx.Node) -> Kind:
        if node.op == "placeholder":
            return "same" if isinstance(info(node).spec, (Param, Buffer, Constant, State)) else "each"
        if node.op == "get_attr":
            return "same"
        kinds = {self._kinds[source] for source in node.all_input_nodes}
        if "unknown" in kinds:
            return "unknown"
        if kinds <= {"same"}:
            return "same"
        if "sum" not in kinds:
            operands = self._operands(node)
            if operands:
                self._reduced[node] = operands
                return "sum"
            return "each"
        if node.target in _LINEAR:
            return "sum" if kinds <= {"sum", "same"} and len(_tensors(node)) == 1 else "unknown"
        if node.target in _ADDITIVE:
            return "sum" if {self._kinds[n] for n in _tensors(node)} == {"sum"} and "each" not in kinds else "unknown"
        if node.target in _BILINEAR:
            first, second = (self._kinds[a] if isinstance(a, fx.Node) else "same" for a in node.args[:2])
            scaled = (first, second) == ("sum", "same")
            swapped = (first, second) == ("same", "sum") and node.target is not aten.div.Tensor
            return "sum" if scaled or swapped else "unknown"
        return "unknown"

    def _operands(self, node: fx.Node) -> dict[int, Operand]:
        """Arguments of an operator that sums over samples, with the dimension of the samples, by position."""
        args: Any = node.args
        if node.target is aten.mm.default and self._differ(*args[:2]):
            return {0: _untransposed(args[0], 1), 1: _untransposed(args[1], 0)}
        if node.target is aten.bmm.default and self._differ(*args[:2]):
            return {0: (args[0], 2), 1: (args[1], 1)}
        if node.target is aten.sum.dim_IntList and args[1]:
            return {0: (args[0], args[1][0] % value(args[0]).dim())}
        if node.target is aten.convolution_backward.default and not args[10][0] and self._differ(*args[:2]):
            return {0: (args[0], 0), 1: (args[1], 0)} if self._kinds[args[2]] == "same" else {}
        if node.target is aten.embedding_dense_backward.default and not args[4] and self._differ(*args[:2]):
            return {0: (args[0], 0), 1: (args[1], 0)}
        return {}

    def _differ(self, *nodes: fx.Node) -> bool:
        return all(self._kinds[n] == "each" for n in nodes)

    # --- the parts as functions --------------------------------------------------------------------------------------

    def _behind(self, results: list[fx.Node]) -> list[fx.Node]:
        """The operators that sum over samples, and what lies between them and the results."""
        wanted, found = set(results), []
        for node in reversed(self.nodes):
            if node in wanted and node.op != "placeholder":
                found.append(node)
                operands = self._reduced.get(node, {})
                wanted.update(
                    source
                    for i, arg in enumerate((*node.args, node.kwargs))
                    if i not in operands
                    for source in _nodes_in(arg)
                )
        return found[::-1]

    def _before(self, results: list[fx.Node]) -> list[fx.Node]:
        wanted, found = set(results), []
        for node in reversed(self.nodes):
            if node in wanted and node.op != "placeholder":
                found.append(node)
                wanted.update(node.all_input_nodes)
        return found[::-1]

    def finish(self, count: int) -> Callable[[list[Any]], Sequence[Any]]:
        """The part behind, for some micro-batches: takes the operands of the first, ..., then what they share."""
        known = self._finish.get(count)
        if known is not None:
            return known
        graph = fx.Graph()
        given = [[graph.placeholder(f"operand_{i}_{k}") for i in range(len(self.operands))] for k in range(count)]
        env = {node: graph.placeholder(node.name) for node in self._shared}
        joined: dict[Operand, fx.Node] = {}

        def join(operand: Operand) -> fx.Node:
            # made right in front of its first reader and freed behind the last one: one layer's copies live at a time
            if operand not in joined:
                i = self.operands.index(operand)
                parts = [given[k][i] for k in range(count)]
                joined[operand] = graph.call_function(aten.cat.default, (parts, operand[1]))
            return joined[operand]

        def operand_of(node: fx.Node, position: int, held: fx.Node) -> fx.Node:
            transposed = self._reduced[node][position][0] is not node.args[position]
            return graph.call_function(aten.t.default, (held,)) if transposed else held

        def made_of(node: fx.Node, held: dict[Operand, fx.Node]) -> fx.Node:
            operands = self._reduced[node]
            args = [
                operand_of(node, i, held[operands[i]]) if i in operands else fx.map_arg(a, env.__getitem__)
                for i, a in enumerate(node.args)
            ]
            return graph.call_function(node.target, tuple(args), fx.map_arg(node.kwargs, env.__getitem__))  # type: ignore[arg-type]

        for node in self._late:
            operands = self._reduced.get(node, {})
            if not operands:
                env[node] = graph.node_copy(node, env.__getitem__)
                continue
            if not _adds_in_place(node):
                env[node] = made_of(node, {operand: join(operand) for operand in operands.values()})
                continue
            first, *others = [{o: own[self.operands.index(o)] for o in operands.values()} for own in given]
            total = made_of(node, first)
            for own in others:
                into = _INTO.get(node.target)
                if into is None:
                    total = graph.call_function(aten.add_.Tensor, (total, made_of(node, own)))
                else:
                    pair = [operand_of(node, i, own[operand]) for i, operand in operands.items()]
                    total = graph.call_function(into, (total, *pair))
            env[node] = total
        graph.output(tuple(env[n] for n in self.together.values()))
        made = self._finish[count] = boxed(fx.GraphModule(self.module, graph))
        return made

    def shared(self, values: Sequence[Any]) -> list[Any]:
        """The values that the part behind reads as they are."""
        wanted = set(self._shared)
        return [v for p, v in zip(self._placeholders, values, strict=True) if p in wanted]


def excerpt(
    module: fx.GraphModule, inputs: list[fx.Node], nodes: list[fx.Node], results: list[fx.Node]
) -> Callable[[list[Any]], Sequence[Any]]:
    """Some nodes of a stage as a callable that empties the list it is given."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in results))
    return boxed(fx.GraphModule(module, graph))


def run_concatenated(micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[list[tuple[OutputSpec, Any]], MicroBatch]]:
    """The weight gradients of micro-batches, those of equal shapes as one.

    Returns:
        Results, and a micro-batch whose leaves they belong to.
    """
    groups: dict[Any, list[tuple[MicroBatch, list[Any]]]] = {}
    for one in micro_batches:
        plan = one.program.concat_plan()
        with torch.no_grad():
            operands = [] if plan is None else list(one.program.execute(plan.prepare, list(one.values)))
        groups.setdefault(_signature(one, plan, operands), []).append((one, operands))
    for group in groups.values():
        first = group[0][0]
        plan = first.program.concat_plan()
        if plan is None:
            continue
        with torch.no_grad():
            results = _group(plan, group)
        yield results, first


def _group(plan: ConcatPlan, group: list[tuple[MicroBatch, list[Any]]]) -> list[tuple[OutputSpec, Any]]:
    first = group[0][0]
    apart: list[Any] = [None] * len(plan.apart)
    if plan.apart:
        for one, _ in group:
            found = one.program.execute(plan.rest, list(one.values))
            apart = [new if old is None else old + new for old, new in zip(apart, found, strict=True)]
    given = [operand for _, operands in group for operand in operands] + plan.shared(first.values)
    for one, operands in group:
        operands.clear()
        one.values = []
    together = first.program.execute(plan.finish(len(group)), given)
    results = dict(zip((*plan.together, *plan.apart), (*together, *apart), strict=True))
    return [(spec, None if first.program.unread(spec, first.missing) else held) for spec, held in results.items()]


def _signature(one: MicroBatch, plan: ConcatPlan | None, operands: list[Any]) -> Any:
    """What micro-batches must have in common to be computed as one."""
    if plan is None:
        return id(one)
    shapes = tuple(
        (*held.shape[:dim], *held.shape[dim + 1 :]) for held, (_, dim) in zip(operands, plan.operands, strict=True)
    )
    shared = tuple((v.data_ptr(), v._version) if isinstance(v, torch.Tensor) else v for v in plan.shared(one.values))
    return id(one.program), one.missing, tuple(id(leaf) for _, leaf in one.leaves), shapes, shared


def _adds_in_place(node: fx.Node) -> bool:
    """Whether micro-batches are added one by one into one result, which copies nothing, rather than concatenated.

    On a CPU that is the faster way at every size that was measured (64 to 1024 samples). Elsewhere one larger product
    fills the device, and in low precision it rounds once.
    """
    held = value(node)
    full = isinstance(held, torch.Tensor) and held.dtype in (torch.float32, torch.float64)
    return full and held.device.type == "cpu" and (node.target in _INTO or node.target is aten.sum.dim_IntList)


def _untransposed(node: fx.Node, dim: int) -> Operand:
    """The operand behind a transposition: the joined matrix is transposed instead, which copies nothing."""
    if node.target is aten.t.default and isinstance(node.args[0], fx.Node):
        return node.args[0], 1 - dim
    return node, dim


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(value(n), (torch.Tensor, tuple, list))]


def _nodes_in(arg: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arg, found.append)
    return found
