"""Store saved tensors in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BFloat16:
    """Round to bfloat16: 16 bits per element, relative error at most 2^-8."""

    name = "bf16"

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor rounded to bfloat16."""
        return tensor.to(torch.bfloat16)

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Back in the original dtype."""
        return residuals[0].to(like.dtype)
