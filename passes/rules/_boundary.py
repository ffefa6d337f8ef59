"""What rules need to know about the shape of a boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphrewrite.graph.nodes import fix, info, is_backward, value
from graphrewrite.graph.ops import ATTENTIONS, CONVOLUTIONS, EMBEDDINGS, MATMULS

aten = torch.ops.aten
_ENDS_MAP = (
    MATMULS
    | EMBEDDINGS
    | ATTENTIONS
    | {aten.transpose.int, aten.permute.default, aten.movedim.int, aten.movedim.intlist, aten.t.default}
)


def is_map(boundary: fx.Node) -> bool:
    """Whether a value is a map of channels: it comes from a convolution, through operators that keep its dimensions.

    A transpose, a reshape to another number of dimensions, a matrix product or an embedding on the way ends the map.
    """
    dims, seen, stack = value(boundary).dim(), {boundary}, [boundary]
    while stack:
        node = stack.pop()
        if node.target in CONVOLUTIONS:
            return True
        if node.target in _ENDS_MAP:
            continue
        for source in node.all_input_nodes:
            held = value(source)
            if isinstance(held, torch.Tensor) and held.dim() != dims:
                continue
            if source.op == "call_function" and source not in seen and not is_backward(source):
                seen.add(source)
                stack.append(source)
    return False


def feature_axis(boundary: fx.Node) -> int:
    """The dimension whose positions are units: 1 for maps of channels, the last one otherwise."""
    return 1 if is_map(boundary) else value(boundary).dim() - 1


def sample_width(boundary: fx.Node) -> int:
    """How many numbers a sample has; fixes the sizes it hangs on."""
    width = 1
    for size in value(boundary).shape[1:]:
        width *= fix(size)
    return width


def names_of(boundaries: Sequence[fx.Node]) -> list[str]:
    """A name for each boundary: its block, numbered from the second one of a block on."""
    count: dict[str, int] = {}
    names = []
    for boundary in boundaries:
        block = info(boundary).block
        number = count.get(block, 0)
        count[block] = number + 1
        names.append(f"{block}_{number}" if number else block)
    return names
