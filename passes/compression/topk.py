"""Store only the largest elements of saved tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graphrewrite.passes.compression._packing import from_groups, to_groups
from graphrewrite.passes.compression.mask import dropout_scale

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Declined, SavedCodec


@dataclass(frozen=True)
class TopK(SavedCodec):
    """Of each group, the k elements of largest magnitude, exact; the others are taken for zero.

    Args:
        fraction: k as a part of the group.
        group: Elements in row-major order, at most 256: an index takes one byte.
    """

    fraction: float = 0.1
    group: int = 256

    name = "topk"
    summary = "the largest elements of each group and their places; zero elsewhere"
    paper = "DropIT (Chen et al., 2023)"
    error = "at most the smallest magnitude that is kept in the group; biased"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise RuleError(f"topk: fraction={self.fraction} is not in (0, 1]")
        if not 1 <= self.group <= 256:
            raise RuleError(f"topk: group={self.group} is not in 1 to 256", remedy="an index takes one byte")

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """Dropout masks are left alone: their elements are equal, and which are the largest says nothing."""
        if dropout_scale(saved.node) is not None:
            return Declined("a dropout mask has no largest elements; `mask` in front of topk stores it in one bit each")
        return super().fit(saved)

    @property
    def kept(self) -> int:
        """How many elements of a group are stored."""
        return max(1, round(self.fraction * self.group))

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """The kept ones' share of number and index."""
        return self.kept / self.group * (8 * dtype.itemsize + 8)

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Numbers and places."""
        rows = to_groups(tensor, self.group, zeros=True)
        places = rows.abs().topk(self.kept, dim=1, sorted=False).indices
        return [rows.gather(1, places), places.to(torch.uint8)]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Zeros with the numbers in their places."""
        numbers, places = residuals
        empty = numbers.new_zeros([numbers.shape[0], self.group])
        return from_groups(empty.scatter(1, places.to(torch.int64), numbers), like)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The smallest magnitude that is kept in the element's group."""
        rows = to_groups(tensor, self.group, zeros=True).abs().to(torch.float64)
        least = rows.topk(self.kept, dim=1).values[:, -1:]
        return from_groups(least.expand_as(rows), torch.empty(tensor.shape, dtype=torch.float64))
