"""Common parts of rules that read other weights in the place of the forward weights in the backward.

Every operator whose input cotangent is taken at a weight (a linear map, a convolution, a product with a parameter)
reads a *feedback weight* there. One feedback weight stands for one parameter, wherever and however often the
parameter is used: tied weights and the steps of a recurrent net share it. Where the model computes the operand from
parameters (a transpose, a chunk of a packed weight, a cast, weight normalisation), the same computation is applied to
the feedback weight.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from graphrewrite.passes.rules._feedback import Distribution, Fill, fill_feedback
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import NodeInfo, Param, Role, fix, flat_inputs, info, is_float, spec_of, value
from graphrewrite.graph.ops import CONVOLUTIONS, MATMULS
from graphrewrite.pipeline import PassResult
from graphrewrite.rule import Rule, select

aten = torch.ops.aten

Scheme = Literal["xavier", "kaiming"]

_WITH_SUMMAND = (aten.addmm.default, aten.baddbmm.default)
_SUMS = (aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class WeightRead:
    """A place where the input cotangent of an operator is taken at a weight.

    Attributes:
        op: The forward operator.
        position: Which of its tensor inputs (`flat_inputs`) is the weight.
    """

    op: fx.Node
    position: int

    @property
    def operand(self) -> fx.Node:
        """The weight as the operator reads it: a parameter, or a value computed from parameters."""
        return flat_inputs(self.op)[self.position]

    @property
    def module(self) -> str:
        """Path of the module that holds the operator."""
        return info(self.op).module


def parameters_behind(node: fx.Node) -> list[fx.Node]:
    """The parameters a value is computed from, in order of discovery."""
    found: dict[fx.Node, None] = {}
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if isinstance(spec_of(current), Param):
            found[current] = None
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return list(found)


def factors(op: fx.Node) -> tuple[int, ...]:
    """Positions of the tensor inputs that an operator multiplies and sums over; () for other operators.

    A product of elements counts if it is summed right behind: that is how attention vectors of graph networks are
    written. Other products with a parameter are element-wise: their derivative stays exact.
    """
    if op.target in _WITH_SUMMAND:
        return (1, 2)
    if op.target in MATMULS or op.target in CONVOLUTIONS:
        return (0, 1)
    if op.target is aten.bilinear.default:
        return (0, 1, 2)
    if op.target is aten.mul.Tensor and len(flat_inputs(op)) == 2 and any(u.target in _SUMS for u in op.users):
        return (0, 1)
    return ()


def weight_reads(graph: JointGraph) -> list[WeightRead]:
    """All places in the running rule's blocks where an input cotangent is taken at a weight."""
    own = {block.name for block in graph.rule_blocks()}
    table = graph.table
    found = []
    for op in graph.forward_nodes():
        if info(op).block not in own:
            continue
        inputs = flat_inputs(op)
        positions = [p for p in factors(op) if is_float(inputs[p])]
        weights = [p for p in positions if table.is_weightlike(inputs[p]) and _is_weight(op, inputs[p])]
        if any(p not in weights and table.requires_grad(inputs[p]) for p in positions):
            found += [WeightRead(op, p) for p in weights]
    return found


def _is_weight(op: fx.Node, operand: fx.Node) -> bool:
    """Whether the operand comes from a parameter; factors of element-wise products need a matrix behind them."""
    least = 2 if op.target is aten.mul.Tensor else 1
    return any(value(p).dim() >= least for p in parameters_behind(operand))


def is_reached(graph: JointGraph, read: WeightRead) -> bool:
    """Whether a cotangent of the operator's activations is computed at present."""
    row = graph.pullback(read.op, "d")
    inputs = flat_inputs(read.op)
    return any(not graph.table.is_weightlike(inputs[p]) for p in row.results)


def output_axis(read: WeightRead) -> int:
    """The dimension of the parameter behind an operand that numbers the operator's outputs; 0 if it cannot be told."""
    op, node = read.op, read.operand
    dims = value(node).dim()
    axis = 0
    if op.target in MATMULS and op.target is not aten.linear.default:
        # a left factor has its outputs in rows, a right one in columns
        left = read.position == factors(op)[0]
        axis = max(dims - (2 if left else 1), 0)
    elif op.target in _TRANSPOSED or (op.target is aten.convolution.default and op.args[6]):
        axis = 1
    while node.op == "call_function":
        step = _LAYOUT.get(node.target)
        if step is None:
            return 0
        axis = step(node, axis)
        node = node.all_input_nodes[0]
    return axis


def group_count(read: WeightRead) -> int:
    """How many groups the outputs of an operator fall into, numbered along the parameter's `output_axis`.

    Transposed convolutions number the outputs of one group only, so theirs count as one.
    """
    target, args = read.op.target, read.op.args
    if target not in CONVOLUTIONS or target in _TRANSPOSED:
        return 1
    if target is aten.convolution.default:
        return 1 if args[6] else int(args[8])  # type: ignore[arg-type]
    return int(args[6]) if len(args) > 6 else 1  # type: ignore[arg-type]


def is_linear_in_parameters(operand: fx.Node) -> bool:
    """Whether a value only rearranges and casts parameters."""
    if operand.op != "call_function":
        return True
    return (operand.target in _LAYOUT or operand.target in _REARRANGE) and all(
        is_linear_in_parameters(source) for source in operand.all_input_nodes if is_float_like(source)
    )


def is_float_like(node: fx.Node) -> bool:
    """Whether a node is a floating-point tensor or a tuple of values."""
    return is_float(node) or isinstance(value(node), (tuple, list))


def _permuted(node: fx.Node, axis: int) -> int:
    dims: Any = node.args[1]
    return int(dims[axis] % len(dims))


def _transposed(node: fx.Node, axis: int) -> int:
    n: int = value(node).dim()
    given: Any = node.args
    first, second = int(given[1]) % n, int(given[2]) % n
    return {first: second, second: first}.get(axis, axis)


def _selected(node: fx.Node, axis: int) -> int:
    dim = int(node.args[1]) % (value(node).dim() + 1)  # type: ignore[arg-type]
    return axis + 1 if axis >= dim else axis


def _kept(_node: fx.Node, axis: int) -> int:
    return axis


_LAYOUT: dict[Any, Callable[[fx.Node, int], int]] = {
    aten.t.default: lambda _node, axis: 1 - axis,
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.select.int: _selected,
    **dict.fromkeys(
        (
            aten._to_copy.default,
            aten.to.dtype,
            aten.slice.Tensor,
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.chunk.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            operator.getitem,
        ),
        _kept,
    ),
}

_REARRANGE = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.cat.default,
    aten.stack.default,
    aten.unbind.int,
}

# --- rules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeedbackRule(Rule):
    """A rule that gives every parameter that is a weight a counterpart, which input cotangents read in its place.

    Args:
        only: Globs on module paths; weights of other modules keep their exact input cotangent.
        skip: Globs on module paths whose weights keep it.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    objective: ClassVar = "global"

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """The value that stands for a parameter in the backward; `read` is the first place that asks for it."""
        raise NotImplementedError(f"{type(self).__name__} defines no counterpart()")

    def reads(self, graph: JointGraph) -> list[WeightRead]:
        """The places this rule edits: those in modules that `only` and `skip` leave."""
        found = weight_reads(graph)
        own = {block.name for block in graph.rule_blocks()}
        operators = [n for n in graph.forward_nodes() if info(n).block in own and factors(n)]
        modules = list(dict.fromkeys(info(n).module for n in operators if not graph.table.is_weightlike(n)))
        wanted = set(select(modules, _globs(self.only), _globs(self.skip)))
        return [read for read in found if read.module in wanted]

    def run(self, graph: JointGraph) -> PassResult:
        """Let every input cotangent that is taken at a weight be taken at the weight's counterpart."""
        reads = [read for read in self.reads(graph) if is_reached(graph, read)]
        if not reads:
            raise RuleError(
                f"{self.name} finds no input cotangent that is taken at a weight: there is nothing to replace",
                remedy="the rule needs a weight behind the first one that learns; check only=, skip= and the rule map",
            )
        counterparts = Counterparts(graph, self.counterpart)
        with graph.deferred():
            for read in reads:
                graph.replace_primal(read.op, read.position, by=counterparts(read))
        return PassResult(graph, True)

    def weight_state(
        self, graph: JointGraph, weight: fx.Node, fill: Fill, *, prefix: str = "feedback", trainable: bool = False
    ) -> fx.Node:
        """State in the form of a parameter."""
        return graph.add_state(
            self.feedback_name(weight, prefix),
            tuple(value(weight).shape),
            fill,
            trainable=trainable,
            dtype=value(weight).dtype,
            device=value(weight).device,
        )

    def feedback_name(self, weight: fx.Node, prefix: str = "feedback") -> str:
        """The name of the feedback state of a parameter."""
        spec = spec_of(weight)
        assert isinstance(spec, Param)
        return self.state_name(f"{prefix}.{spec.name}")


def _globs(given: tuple[str, ...] | str) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


class Counterparts:
    """Operands of the backward: what the model computes from parameters, computed from their counterparts."""

    def __init__(self, graph: JointGraph, make: Callable[[JointGraph, fx.Node, WeightRead], fx.Node]) -> None:
        self._graph = graph
        self._make = make
        self._made: dict[fx.Node, fx.Node] = {}

    def __call__(self, read: WeightRead) -> fx.Node:
        """The counterpart of the operand of a weight read."""
        return self._of(read.operand, read)

    def _of(self, node: fx.Node, read: WeightRead) -> fx.Node:
        known = self._made.get(node)
        if known is None:
            known = self._made[node] = self._new(node, read)
        return known

    def _new(self, node: fx.Node, read: WeightRead) -> fx.Node:
        if isinstance(spec_of(node), Param):
            return self._make(self._graph, node, read)
        sources = {source: self._of(source, read) for source in node.all_input_nodes}
        if all(new is old for old, new in sources.items()):
            return node
        args, kwargs = fx.map_arg((node.args, node.kwargs), sources.__getitem__)
        return self._graph.emit(node.target, args, kwargs, like=feedback_info(read))  # type: ignore[arg-type]


def feedback_info(read: WeightRead) -> NodeInfo:
    """What nodes that compute a feedback weight know of themselves: they belong to the backward of the operator."""
    return info(read.op).but(role=Role.COTANGENT, mirrors=None, cotangent_of=None)


# --- sizes and initial values --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fans:
    """How many inputs and outputs one element of a parameter connects."""

    inputs: int
    outputs: int

    @staticmethod
    def of(weight: fx.Node, read: WeightRead) -> Fans:
        """The fans of a parameter, by the operator that reads it."""
        shape = [fix(size) for size in value(weight).shape]
        if len(shape) < 2:
            return Fans(math.prod(shape), 1)
        axis = output_axis(read)
        other = 1 if axis == 0 else 0
        field = math.prod(size for i, size in enumerate(shape) if i not in (axis, other))
        return Fans(shape[other] * field, shape[axis] * field)


def deviation(scheme: str, fans: Fans) -> float:
    """Standard deviation of initial weights: sqrt(2 / (in + out)) for Xavier, 1 / sqrt(3 in) for Kaiming."""
    if scheme == "xavier":
        return math.sqrt(2.0 / (fans.inputs + fans.outputs))
    if scheme == "kaiming":
        return 1.0 / math.sqrt(3.0 * fans.inputs)
    raise RuleError(f"init={scheme!r} is unknown", remedy="use 'xavier' or 'kaiming'")


def fill_weights(distribution: Distribution, std: float) -> Fill:
    """Fills with numbers of mean zero and this standard deviation."""
    return fill_feedback(distribution, std * math.sqrt(3.0))


def same_on_all_ranks(counter: torch.Tensor) -> torch.Tensor:
    """The counter with rank 0: feedback weights must not differ between the replicas of a model."""
    return torch.cat([counter[:2], torch.zeros_like(counter[:1])])
