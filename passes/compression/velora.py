"""Project sub-tokens of saved tensors on a fixed direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graphrewrite.passes.compression._packing import work_dtype
from graphrewrite.passes.compression._subspace import leading_directions, project, scaled, width_of

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Declined, SavedCodec


@dataclass(frozen=True)
class VeLoRA(SavedCodec):
    """The features of a token are split into groups; of each sub-token z only z . v is stored, z^ = (z . v) v.

    v is the normalised mean of the batch's sub-tokens. The paper takes the mean of the first batch and keeps it; here
    it is that of the batch at hand, stored with the coefficients (features / groups numbers). With rank > 1, v is an
    orthonormal basis found by subspace iteration.

    Args:
        groups: Sub-tokens per token.
        rank: Directions per sub-token.
    """

    groups: int = 8
    rank: int = 1

    name = "velora"
    summary = "sub-tokens projected on one direction"
    paper = "VeLoRA (Miles et al., 2024)"
    error = "in norm, at most that of the tensor; biased"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.rank < 1:
            raise RuleError(f"velora: groups={self.groups} and rank={self.rank} must be at least 1")

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """Tensors whose features split into the groups."""
        width = width_of(saved, self.rank, self.groups)
        return width if isinstance(width, Declined) else super().fit(saved)

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """Of a tensor with 1024 features; rank * groups / features of the dtype's in general."""
        return 8 * dtype.itemsize * self.rank * self.groups / 1024

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Coefficients and directions.

        Raises:
            RuleError: The features do not split into the groups; `fit` declines such values.
        """
        if tensor.dim() == 0 or tensor.shape[-1] % self.groups:
            raise RuleError(
                f"velora: a tensor of shape {tuple(tensor.shape)} does not split into groups={self.groups}",
                remedy="choose groups that divide the last dimension",
            )
        rows = tensor.reshape(-1, tensor.shape[-1] // self.groups).to(work_dtype(tensor.dtype))
        if self.rank > 1:
            basis = leading_directions(rows, self.rank, 2)
        else:
            mean = scaled(rows).sum(0)[:, None]
            basis = mean / mean.norm().clamp_min(torch.finfo(rows.dtype).tiny)
        return project(rows, basis, tensor.dtype)

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Coefficients times directions."""
        return (residuals[0] @ residuals[1].t()).view(like.shape)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The norm of the tensor: a projection makes nothing longer."""
        norm: torch.Tensor = tensor.to(torch.float64).norm()
        return norm * (1 + 8 * torch.finfo(tensor.dtype).eps * (self.rank + 1))
