"""Nodes that one kernel computes together: two operators that read the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.backends.triton import activation, norms
from graphrewrite.backends.triton.support import Kernel
from torch import fx

from graphrewrite.graph.nodes import value

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """Two nodes and the kernel whose results they are, in this order.

    Attributes:
        first: Its first result.
        second: Its second result.
        kernel: What computes both.
        args: The kernel's arguments, nodes of the stage among them.
        split: From the kernel's results to those of the two nodes.
    """

    first: fx.Node
    second: fx.Node
    kernel: Kernel
    args: tuple[Any, ...]
    split: Callable[[Any], tuple[Any, Any]] = tuple

    def launch(self, *args: Any) -> tuple[Any, Any]:
        """The results of both nodes."""
        return self.split(self.kernel.launch(*args))


def pairs(graph: fx.Graph) -> Iterator[Pair]:
    """The pairs of a stage that a kernel takes."""
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        find = _FINDERS.get(node.target)
        for found in find(node) if find is not None else ():
            if found.first in taken or found.kernel.why_not(*fx.map_arg(found.args, value)):
                continue
            taken.add(found.first)
            yield found
            break


def _activation_and_codes(codes: fx.Node) -> Iterator[Pair]:
    """An activation of the tensor whose codes are kept."""
    x, borders, numbers, bits = codes.args
    assert isinstance(x, fx.Node)
    for reader in x.users:
        kind = _kind(reader)
        if kind:
            yield Pair(reader, codes, activation.few_bit_activation, (x, borders, numbers, kind, bits))


def _norm_and_normalised(shared: fx.Node) -> Iterator[Pair]:
    """The layer norm of the tensor whose normalised form is kept."""
    x, dims, eps, rms = shared.args
    assert isinstance(x, fx.Node)
    for reader in x.users:
        if rms or reader.target is not aten.native_layer_norm.default or reader.args[0] is not x:
            continue
        _, shape, weight, bias, own = reader.args
        read = {user.args[1] for user in reader.users}
        if weight is not None and len(shape) == dims and own == eps and read == {0}:  # type: ignore[arg-type]
            yield Pair(reader, shared, norms.ms_norm_affine, (x, weight, bias, dims, eps, False), _norm_first)


def _norm_first(results: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """As `native_layer_norm`, of whose results only the first is read, and as `ms_norm`."""
    y, z, rstd = results
    return (y,), (z, rstd)


def _kind(node: fx.Node) -> str:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return _KINDS.get(node.target, "")


_KINDS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.relu.default: "relu",
}
_FINDERS: dict[Any, Callable[[fx.Node], Iterator[Pair]]] = {
    torch.ops.graphrewrite.few_bit_codes.default: _activation_and_codes,
    torch.ops.graphrewrite.ms_norm.default: _norm_and_normalised,
}
