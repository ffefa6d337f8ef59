"""Store saved tensors in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphrewrite.graph.codec import SavedCodec


@dataclass(frozen=True)
class BFloat16(SavedCodec):
    """Round to bfloat16: 16 bits per element, relative error at most 2^-8."""

    name = "bf16"
    summary = "Round to bfloat16: 16 bits per element, relative error at most 2^-8"
    error = "relative, at most 2^-8"
    dtypes = (torch.float64, torch.float32)

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """16."""
        return 16.0

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor rounded to bfloat16."""
        return tensor.to(torch.bfloat16)

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Back in the original dtype."""
        return residuals[0].to(like.dtype)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """2^-8 of the element, and the smallest number above zero."""
        return tensor.abs() * 2.0**-8 + torch.finfo(torch.bfloat16).smallest_normal * 2.0**-7
