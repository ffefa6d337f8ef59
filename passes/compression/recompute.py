"""Compute values again in the backward instead of saving them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.analysis.recomputation import inside_blocks, minimum_cut, repeatable
from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Declined, SavedCodec, inside
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import info


@dataclass(frozen=True)
class Recompute(SavedCodec):
    """Nothing is stored: the operators run again, right before their result is read. Gradients are bitwise the same.

    Random operators never run again: their results stay saved (a `mask` makes them small).

    Args:
        plan: `"min_cut"`: the set of cheap operators (no products, convolutions, attention) whose repetition leaves the
            least to save; with further codecs behind it, counted in encoded bytes. `"blocks"`: everything inside of
            blocks, as `torch.utils.checkpoint` around each block. `"all"`: everything, from the inputs on.
    """

    plan: Literal["min_cut", "blocks", "all"] = "min_cut"

    name = "recompute"
    summary = "compute the value again in the backward; exact"
    paper = "Chen et al., 2016; Reducing Activation Recomputation (Korthikanti et al., 2022)"
    error = "none: gradients are bitwise the same"
    exact = True
    how = "recompute"

    def __post_init__(self) -> None:
        if self.plan not in ("min_cut", "blocks", "all"):
            raise RuleError(f"recompute: plan={self.plan!r} is unknown", remedy="use 'min_cut', 'blocks' or 'all'")

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """None."""
        return 0.0

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """A codec of its own it is not: the compressing pass repeats the operators."""
        return tensor

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return residuals[0]

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """Where a value was not repeated, it is one that the repetition starts from."""
        return Declined("it is random, costly, or what the repetition starts from")

    def nodes(self, graph: JointGraph, price: Callable[[fx.Node], float] | None = None) -> set[fx.Node]:
        """The operators to repeat."""
        if self.plan == "min_cut":
            found = minimum_cut(graph, price)
        else:
            found = inside_blocks(graph) if self.plan == "blocks" else repeatable(graph)
        return {node for node in found if self._selects_node(node)}

    def _selects_node(self, node: fx.Node) -> bool:
        module = info(node).module
        if self.only and not any(inside(module, glob) for glob in self.only):
            return False
        return not any(inside(module, glob) for glob in self.skip)
