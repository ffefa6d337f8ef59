"""Scalar functions in a graph: activation operators, and activations that a model writes out in element-wise steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphrewrite.graph.aliasing import base_of, views_of
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Role, flat_inputs, info, is_backward, is_float, value
from graphrewrite.graph.ops import ACTIVATIONS, is_pointwise, is_random
from graphrewrite.graph.tape import Tape

aten = torch.ops.aten

SCALAR_OPERATORS = ACTIVATIONS - {aten.prelu.default}
_LONGEST = 24


@dataclass(frozen=True)
class Region:
    """Operators that together are a function of one tensor, element by element.

    Attributes:
        argument: The tensor.
        result: The last operator.
        operators: All of them, in order.
    """

    argument: fx.Node
    result: fx.Node
    operators: tuple[fx.Node, ...]

    @property
    def key(self) -> str:
        """The function as text: equal regions have equal keys."""
        names = {self.argument: "x"} | {node: f"t{i}" for i, node in enumerate(self.operators)}

        def show(arg: Any) -> str:
            if isinstance(arg, fx.Node):
                return names[arg]
            return f"[{','.join(map(show, arg))}]" if isinstance(arg, (list, tuple)) else repr(arg)

        calls = []
        for node in self.operators:
            target = str(node.target).removeprefix("aten.").removesuffix(".default")
            given = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in sorted(node.kwargs.items())]
            calls.append(f"{target}({','.join(given)})")
        return ";".join(calls)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate the function."""
        env: dict[fx.Node, Any] = {self.argument: x}
        for node in self.operators:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        found: torch.Tensor = env[self.result]
        return found


def find_regions(graph: JointGraph, *, written_out: bool) -> Iterator[Region]:
    """The scalar functions of the forward that a cotangent passes through.

    A written-out activation is one whose intermediate values nothing else reads, within one block.
    """
    forward = [n for n in graph.forward_nodes() if info(n).role is Role.FORWARD]
    chains = _chains(forward) if written_out else {}
    covered: set[fx.Node] = set()
    found = []
    for node in reversed(forward):
        if node in covered or graph.cotangent(node) is None:
            continue
        region = _largest(graph, node, chains.get(node, ()))
        if region is None and len(flat_inputs(node)) == 1 and (node in chains or node.target in SCALAR_OPERATORS):
            region = Region(flat_inputs(node)[0], node, (node,))
        if region is not None:
            covered.update(region.operators)
            found.append(region)
    yield from reversed(found)


def _chains(forward: list[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each element-wise operator the values that it is a function of, each of them alone, itself last."""
    chains: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in forward:
        inputs = list(dict.fromkeys(flat_inputs(node)))
        if not inputs or not _elementwise(node, inputs):
            continue
        alone = [chains.get(source, (source,)) for source in inputs]
        shared = [value for value in alone[0] if all(value in other for other in alone[1:])]
        if shared:
            chains[node] = (*shared[-_LONGEST:], node)
    return chains


def _elementwise(node: fx.Node, inputs: list[fx.Node]) -> bool:
    val: Any = node.meta.get("val")
    if not is_pointwise(node) or is_random(node) or node.target is aten.prelu.default or not _number(val):
        return False
    if node.target is aten.dropout.default or any(not _number(source.meta.get("val")) for source in inputs):
        return False
    floats = {v.dtype for v in (val, *(value(s) for s in inputs)) if v.dtype != torch.bool}
    return len(floats) <= 1 and all(tuple(value(s).shape) == tuple(val.shape) for s in inputs)


def _number(val: Any) -> bool:
    return isinstance(val, torch.Tensor) and (val.is_floating_point() or val.dtype == torch.bool)


def _largest(graph: JointGraph, node: fx.Node, chain: tuple[fx.Node, ...]) -> Region | None:
    """The most operators that end in `node` and are a function of one tensor; None if that is `node` alone."""
    if not is_float(node):
        return None
    for argument in chain[:-1]:
        if not is_float(argument):
            continue
        operators = _between(argument, node)
        if len(operators) > 1 and _closed(graph, argument, node, operators):
            return Region(argument, node, operators)
    return None


def _between(argument: fx.Node, result: fx.Node) -> tuple[fx.Node, ...]:
    inside: dict[fx.Node, None] = {}
    stack = [result]
    while stack:
        node = stack.pop()
        if node is argument or node in inside:
            continue
        inside[node] = None
        stack += flat_inputs(node)
    return tuple(sorted(inside))


def _closed(graph: JointGraph, argument: fx.Node, result: fx.Node, operators: tuple[fx.Node, ...]) -> bool:
    inside, table = set(operators), graph.table
    if table.is_weightlike(result) or {info(n).block for n in operators} != {info(result).block}:
        return False
    if any(not row.plain for node in operators for row in table.rows(node)):
        return False
    if any((source, node) in table.cuts for node in operators for source in flat_inputs(node)):
        return False
    for node in inside - {result}:
        if node in table.seeds or node in graph.model_outputs:
            return False
        if any(user not in inside and not is_backward(user) for user in node.users):
            return False
    return table.requires_grad(argument)


def readers(graph: JointGraph, node: fx.Node) -> list[fx.Node]:
    """The forward operators whose derivative, as it stands, reads a value or a view of it."""
    base, table = base_of(node), graph.table
    found: dict[fx.Node, None] = {}
    for held in (base, *views_of(base)):
        for op in (held, *held.users):
            if op.op != "call_function" or is_backward(op) or not table.requires_grad(op):
                continue
            if base in read_by(graph, op):
                found[op] = None
    return list(found)


def read_by(graph: JointGraph, op: fx.Node) -> set[fx.Node]:
    """The values, views resolved, that an operator's derivative reads, as it stands."""
    kept: set[fx.Node] = set()
    for row in graph.table.rows(op):
        if not row.active:
            continue
        if row.bwd is not None:
            kept.update(base_of(n) for n in row.residuals)
            continue
        owners = {_storage(value(n)): base_of(n) for n in (*flat_inputs(op), op) if isinstance(value(n), torch.Tensor)}
        seen: set[int] = set()

        def pack(tensor: torch.Tensor, seen: set[int] = seen) -> torch.Tensor:
            seen.add(_storage(tensor))
            return tensor

        with graph.tracing(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tape = Tape(op, value, row.active)
        for out in tape.outputs:
            if isinstance(out, torch.Tensor):
                owners[_storage(out)] = base_of(op)
        kept.update(owner for storage, owner in owners.items() if storage in seen)
    return kept


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]
