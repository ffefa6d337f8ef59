"""What is saved between the forward and the backward, and what the backward wants of it.

An operator of the backward reads a saved value for its numbers, for one comparison with a constant (the derivative of
ReLU), or for its shape only. Some operators need the exact numbers: a small error would be multiplied, or would decide
a comparison the other way. That table is here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from graphrewrite.graph.aliasing import base_of, mutated_bases, owns_no_memory, views_of
from graphrewrite.graph.nodes import (
    LOSS_BLOCK,
    Buffer,
    Constant,
    Param,
    State,
    dense_order,
    info,
    is_getitem,
    producer,
    runs_last,
    runs_later,
    spec_of,
    value,
)
from graphrewrite.graph.ops import is_random
from graphrewrite.graph.partition import Partition, partition
from graphrewrite.graph.text import operator_name

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph

aten = torch.ops.aten


class Demand(StrEnum):
    """What an operator of the backward reads a saved value for."""

    VALUE = "value"
    SIGN = "sign"
    """One comparison with constants, element by element."""
    SHAPE = "shape"
    EXACT = "exact"
    """Its numbers, exactly."""


_NUMBERS: dict[str, dict[int, str]] = {
    "native_layer_norm_backward": {3: "mean", 4: "rstd"},
    "native_group_norm_backward": {2: "mean", 3: "rstd"},
    "native_batch_norm_backward": {3: "running mean", 4: "running variance", 5: "mean", 6: "inverse deviation"},
    "cudnn_batch_norm_backward": dict.fromkeys(range(3, 9), "statistics"),
    "miopen_batch_norm_backward": dict.fromkeys(range(3, 8), "statistics"),
    "batch_norm_backward": dict.fromkeys(range(3, 7), "statistics"),
    "_fused_rms_norm_backward": {3: "rstd"},
    "_scaled_dot_product_flash_attention_for_cpu_backward": {5: "logsumexp"},
    "_scaled_dot_product_flash_attention_backward": dict.fromkeys((5, 6, 7, 12, 13), "logsumexp"),
    "_scaled_dot_product_efficient_attention_backward": dict.fromkeys((6, 7, 8), "logsumexp"),
    "_scaled_dot_product_cudnn_attention_backward": dict.fromkeys((5, 6, 7, 9, 10), "logsumexp"),
    "div": {1: "denominator"},
    "reciprocal": {0: "denominator"},
    "rsqrt": {0: "radicand"},
    "log": {0: "argument"},
    "pow": {0: "base", 1: "exponent"},
    "native_dropout_backward": {1: "mask"},
}
"""Arguments of which a small error would grow without bound, or that are small anyway."""
_STATISTICS = frozenset({"mean", "variance", "rstd", "inverse deviation", "statistics", "logsumexp"})
"""Those of them that summarise another argument of the same operator."""
_DECIDING = frozenset(
    {
        *("eq", "ne", "lt", "le", "gt", "ge", "sign", "sgn", "floor", "ceil", "round", "trunc", "frac", "remainder"),
        *("max", "min", "amax", "amin", "argmax", "argmin", "sort", "topk", "kthvalue", "median", "isnan", "isinf"),
        *("where", "bitwise_and", "bitwise_or", "bitwise_not", "logical_and", "logical_or", "logical_not"),
    }
)
"""Operators that decide something by the numbers."""
_SHAPES: dict[str, tuple[int, ...]] = {
    "max_pool2d_with_indices_backward": (1,),
    "max_pool3d_with_indices_backward": (1,),
    "avg_pool2d_backward": (1,),
    "avg_pool3d_backward": (1,),
    "_adaptive_avg_pool2d_backward": (1,),
    "_adaptive_avg_pool3d_backward": (1,),
    "sym_size": (0,),
    "sym_stride": (0,),
    "sym_numel": (0,),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like"), (0,)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), (0,)),
}
Comparison = tuple[str, tuple[float, ...]]


@dataclass(frozen=True)
class Reading:
    """One operator of the backward that reads a saved value, or a view of it.

    Attributes:
        reader: The operator, or the backward's view of the value.
        demand: What for.
        what: For `EXACT`, the argument in words.
        comparison: For `SIGN`, which one: equal comparisons can share a mask.
    """

    reader: fx.Node
    demand: Demand
    what: str = ""
    comparison: Comparison | None = None


@dataclass(frozen=True)
class SavedValue:
    """A value that lives between the forward and the backward and takes memory.

    Attributes:
        node: What owns the memory.
        nbytes: Bytes at the example's sizes.
        readings: Who reads it in the backward.
        closed: Why nothing may be done about it; "" if something may.
        of_parameters: Whether it is computed from parameters alone.
        spares_the_loss: Whether values of the loss are left as they are: all gradients come from them.
    """

    spares_the_loss: ClassVar[bool] = True

    node: fx.Node
    nbytes: int
    readings: tuple[Reading, ...]
    closed: str = ""
    of_parameters: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return value(self.node).dtype  # type: ignore[no-any-return]

    @property
    def module(self) -> str:
        """Path of the module that computed it."""
        return info(self.node).module

    @property
    def operators(self) -> set[str]:
        """Names of the operators that compute it and that read it in the backward."""
        return {operator_name(producer(self.node))} | {operator_name(one.reader) for one in self.readings}

    @property
    def needed_exactly(self) -> str:
        """Which operator needs the exact numbers; "" if an approximation will do."""
        for one in self.readings:
            if one.demand is Demand.EXACT:
                return f"{operator_name(one.reader)} ({one.what})" if one.what else operator_name(one.reader)
        if self.of_parameters:
            return "what is computed from parameters alone"
        if self.spares_the_loss and info(self.node).block == LOSS_BLOCK:
            return "the loss, of which an error would reach every gradient,"
        return ""

    @property
    def is_statistic(self) -> bool:
        """Whether what needs it exactly also reads what it summarises: if that changes, it may change with it."""
        if self.of_parameters or (self.spares_the_loss and info(self.node).block == LOSS_BLOCK):
            return False
        return all(one.what in _STATISTICS for one in self.readings if one.demand is Demand.EXACT)

    def demanding(self, *demands: Demand) -> SavedValue:
        """The same value, with only the readers of some demands."""
        return replace(self, readings=tuple(one for one in self.readings if one.demand in demands))


def saved_values(graph: JointGraph, part: Partition | None = None) -> list[SavedValue]:
    """What is saved, in the order in which it is computed; inputs, parameters and sizes are referenced, not saved."""
    part = part or partition(graph)
    stored = {one.node: one for one in part.saved if one.nbytes and not one.is_input}
    results = {base_of(node) for node in part.graph.outputs.values()}
    written = mutated_bases(graph.nodes)
    data = _data_dependent(graph)
    read = {node: tuple(_readings(node)) for node in graph.nodes if node in stored}
    return [
        SavedValue(
            node,
            stored[node].nbytes,
            readings,
            # an early gradient that leaves as a view of it has no reader: it is only given away
            _closed(node, stored[node].carried or not readings, node in results, node in written),
            node not in data,
        )
        for node, readings in read.items()
    ]


@dataclass(frozen=True)
class HeldValue(SavedValue):
    """A value that the first stage of a split backward leaves for the weight stage: an error reaches few gradients."""

    spares_the_loss = False


def held_values(graph: JointGraph) -> list[SavedValue]:
    """What the first stage of a split backward computes, or is handed, and the weight stage reads."""
    part = partition(graph)
    stored = {one.node: one for one in part.held if one.nbytes and one.saved < 0}
    results = {base_of(node) for node in graph.outputs.values()}
    written = mutated_bases(graph.nodes)
    return [
        HeldValue(
            node,
            one.nbytes,
            tuple(_readings(node, held=True)),
            _closed(node, False, node in results, node in written),
        )
        for node, one in stored.items()
    ]


def _closed(node: fx.Node, carried: bool, is_result: bool, is_written: bool) -> str:
    if carried:
        return "it is a finished gradient"
    if is_result:
        return "it is a result of the call: the caller holds it anyway"
    if is_written:
        return "an in-place operator writes to it"
    if info(node).codec:
        return "it is encoded already"
    if not isinstance(value(node), torch.Tensor):
        return "it is no tensor"
    if dense_order(value(node)) is None:
        return "its elements leave gaps in memory"
    return ""


def _data_dependent(graph: JointGraph) -> set[fx.Node]:
    """What depends on more than parameters: on inputs, targets or random numbers."""
    found: set[fx.Node] = set()
    fixed = (Param, Buffer, Constant, State)
    for node in graph.nodes:
        if node.op == "placeholder":
            if not isinstance(spec_of(node), fixed):
                found.add(node)
        elif is_random(node) or any(s in found and not _is_size(s) for s in node.all_input_nodes):
            found.add(node)
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt)


def _readings(node: fx.Node, *, held: bool = False) -> Iterator[Reading]:
    later = runs_last if held else runs_later
    for alias in (node, *views_of(node, held=held)):
        for user in alias.users:
            if later(user):
                yield _reading(user, alias)


def _reading(reader: fx.Node, alias: fx.Node) -> Reading:
    name = operator_name(reader)
    if owns_no_memory(reader):
        # a view that the backward makes: what matters is who reads that
        seen = [_reading(user, reader) for user in reader.users]
        worst = next((one for one in seen if one.demand is Demand.EXACT), None)
        if worst is not None:
            return replace(worst, reader=reader)
        comparisons = {one.comparison for one in seen}
        if seen and all(one.demand is Demand.SHAPE for one in seen):
            return Reading(reader, Demand.SHAPE)
        if len(comparisons) == 1 and seen[0].demand is Demand.SIGN:
            return replace(seen[0], reader=reader)
        return Reading(reader, Demand.VALUE)
    found: Reading | None = None
    for position, given in enumerate(reader.args):
        held = given if isinstance(given, (list, tuple)) else [given]
        if any(one is alias for one in held):
            one = _at(reader, name, position)
            found = one if found is None or found.demand is not Demand.EXACT else found
    return found or Reading(reader, Demand.VALUE)


def _at(reader: fx.Node, name: str, position: int) -> Reading:
    if position in _SHAPES.get(name, ()):
        return Reading(reader, Demand.SHAPE)
    comparison = comparison_of(reader, position)
    if comparison is not None:
        return Reading(reader, Demand.SIGN, comparison=comparison)
    if name == "pow" and position == 0 and isinstance(reader.args[1], (int, float)) and 1 <= reader.args[1] <= 3:
        # x to x^3: an error of x changes it about as much
        return Reading(reader, Demand.VALUE)
    if position in _NUMBERS.get(name, {}):
        return Reading(reader, Demand.EXACT, _NUMBERS[name][position])
    if name in _DECIDING or name.startswith("linalg_"):
        return Reading(reader, Demand.EXACT, "it decides by the numbers")
    namespace = getattr(reader.target, "namespace", "aten")
    if namespace not in ("aten", "prims", "prim") and reader.target is not operator.getitem:
        return Reading(reader, Demand.EXACT, "an operator that is not known here")
    return Reading(reader, Demand.VALUE)


def comparison_of(reader: fx.Node, position: int) -> Comparison | None:
    """The comparison for which a derivative reads its input; None if it needs more than that."""
    args: Any = reader.args
    if position != 1:
        return None
    if reader.target is aten.threshold_backward.default:
        return "above", (float(args[2]),)
    if reader.target is aten.hardtanh_backward.default:
        return "between", (float(args[2]), float(args[3]))
    if reader.target is aten.hardsigmoid_backward.default:
        return "hardsigmoid", (-3.0, 3.0)
    if reader.target is aten.leaky_relu_backward.default:
        return "positive", ()
    return None


def is_pool_index(node: fx.Node) -> bool:
    """Whether a value is the index output of a max pooling."""
    return is_getitem(node) and node.args[1:] == (1,) and producer(node).target is aten.max_pool2d_with_indices.default
