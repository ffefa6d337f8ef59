"""How a saved tensor is stored between the forward and the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Codec(Protocol):
    """Encodes a saved tensor. Both functions are ordinary PyTorch code, traced into the graph."""

    def encode(self, tensor: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor]:
        """What is stored in the place of `tensor`."""

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape and dtype of `like`."""
