"""Store saved tensors in float16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphrewrite.graph.codec import SavedCodec

LARGEST = 65504.0


@dataclass(frozen=True)
class Float16(SavedCodec):
    """Round to float16, behind a power of two that brings the largest element below 65504.

    The scale is one number for the whole tensor, and 1 unless an element would overflow.
    """

    name = "fp16"
    summary = "float16 with a power-of-two scale for the tensor"
    error = "relative, at most 2^-11; absolute below 6e-5 times the scale"
    dtypes = (torch.float64, torch.float32, torch.bfloat16)

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """16."""
        return 16.0

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The rounded tensor, and the scale."""
        scale = self._scale(tensor)
        return [(tensor / scale).to(torch.float16), scale.to(torch.float32)]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Back in the original dtype, times the scale."""
        return residuals[0].to(like.dtype) * residuals[1].to(like.dtype)

    @staticmethod
    def _scale(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 0:
            return tensor.new_ones(())
        top = tensor.abs().amax()
        scale = torch.exp2((top / LARGEST).log2().ceil().clamp(0.0))
        # an infinity or a NaN stays where it is, and the others keep their numbers
        return torch.where(top.isfinite(), scale, 1.0)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """2^-11 of the element, half the smallest float16 times the scale, and the rounding of the original dtype."""
        exact = tensor.to(torch.float64)
        own = exact.abs() * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).smallest_normal
        return exact.abs() * 2.0**-11 + 2.0**-25 * self._scale(exact) * 1.01 + own
