"""Nodes that one kernel computes together: two operators that read the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.backends.triton import activation
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
    """

    first: fx.Node
    second: fx.Node
    kernel: Kernel
    args: tuple[Any, ...]


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
}
