"""Keep saved tensors as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.graph.codec import Declined, SavedCodec


@dataclass(frozen=True)
class Keep(SavedCodec):
    """Takes every value and leaves it alone: to exempt what `only`, `skip` or `operators` select from later codecs."""

    name = "none"
    summary = "keep the value as it is"
    error = "none"
    exact = True
    how = "keep"

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return residuals[0]

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """Every value."""
        return self
