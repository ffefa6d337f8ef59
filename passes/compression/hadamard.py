"""Rotate saved tensors before they are quantised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.compression._integers import GroupedInteger
from graphrewrite.passes.compression._packing import from_groups, to_groups, work_dtype
from graphrewrite.passes.compression.int2 import Int2
from graphrewrite.passes.compression.int4 import Int4
from graphrewrite.passes.compression.int8 import Int8

from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Draw, SavedCodec

_INTEGERS: dict[int, type[GroupedInteger]] = {2: Int2, 4: Int4, 8: Int8}


@dataclass(frozen=True)
class Hadamard(SavedCodec):
    """Integers of H x / sqrt(g), where H is the Hadamard matrix of the group: an outlier is spread over its group.

    The rotation keeps norms, so the error is that of the integers, on numbers of a smaller range.

    Args:
        bits: 2, 4 or 8.
        group: Elements that are rotated together and share a scale; a power of two.
        symmetric: No minimum is stored.
        rounding: `"nearest"` or `"stochastic"`.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"

    name = "hadamard"
    summary = "integers of the Hadamard-rotated group: robust to outliers"
    paper = "HOT (Kim et al., 2025), Training Transformers with 4-bit Integers (Xi et al., 2023)"
    error = "in norm, that of the integers of the rotated tensor"

    def __post_init__(self) -> None:
        if self.bits not in _INTEGERS:
            raise RuleError(f"hadamard: bits={self.bits} is not one of {sorted(_INTEGERS)}")
        if self.group < 2 or self.group & (self.group - 1):
            raise RuleError(f"hadamard: group={self.group} is no power of two", remedy="use 32, 64 or 128")
        _ = self._integers

    @property
    def _integers(self) -> GroupedInteger:
        return _INTEGERS[self.bits](self.group, self.symmetric, self.rounding)

    @property
    def random(self) -> bool:
        """Stochastic rounding draws one number per element."""
        return self._integers.random

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """Those of the integers."""
        return self._integers.bits_per_element(dtype)

    def encode(self, tensor: torch.Tensor, *, draw: Draw | None = None) -> Sequence[torch.Tensor]:
        """The integers of the rotated groups."""
        return self._integers.encode(self._rotated(tensor), draw=draw)

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Rotated back: H is its own inverse."""
        dtype = work_dtype(like.dtype)
        shape = [residuals[1].shape[0], self.group]
        rows = self._integers.decode(residuals, torch.empty(shape, dtype=dtype, device=like.device))
        return from_groups(rotate(rows), like)

    def _rotated(self, tensor: torch.Tensor) -> torch.Tensor:
        return rotate(to_groups(tensor, self.group).to(work_dtype(tensor.dtype)))

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The norm of the integers' bounds."""
        own = tensor.to(torch.float64).norm() * 16 * torch.finfo(tensor.dtype).eps
        within = self._integers.bound(self._rotated(tensor))
        assert within is not None
        whole: torch.Tensor = within.norm() * 1.001 + own + torch.finfo(tensor.dtype).tiny * tensor.numel()
        return whole


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """Every row times the Hadamard matrix over the root of its length: log2(length) rounds of sums and differences."""
    width = rows.shape[1]
    half = 1
    while half < width:
        pairs = rows.view(-1, width // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([first + second, first - second], 2).view(-1, width)
        half *= 2
    return rows * (1 / math.sqrt(width))
