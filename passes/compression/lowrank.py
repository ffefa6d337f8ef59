"""Store a low-rank factorisation of saved tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graphrewrite.passes.compression._packing import work_dtype
from graphrewrite.passes.compression._subspace import leading_directions, project, width_of

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Declined, SavedCodec


@dataclass(frozen=True)
class LowRank(SavedCodec):
    """X, as rows of its last dimension, becomes X V and V; X^ = (X V) V^T.

    V is an orthonormal basis found by subspace iteration on the batch itself.

    Args:
        rank: Columns of V.
        steps: Rounds of subspace iteration.
    """

    rank: int = 8
    steps: int = 2

    name = "lowrank"
    summary = "rows projected on the leading directions of the batch"
    paper = "CompAct (Shamshoum et al., 2025); randomised subspace iteration (Halko et al., 2011)"
    error = "in norm, at most that of the tensor; zero for rank <= rank; biased"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1:
            raise RuleError(f"lowrank: rank={self.rank} and steps={self.steps} must be at least 1")

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """Matrices whose rows are wider than the rank."""
        width = width_of(saved, self.rank)
        return width if isinstance(width, Declined) else super().fit(saved)

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """Of a tensor with 1024 features; rank / features of the dtype's in general."""
        return 8 * dtype.itemsize * self.rank / 1024

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Coefficients and basis."""
        rows = tensor.reshape(-1, tensor.shape[-1]).to(work_dtype(tensor.dtype))
        return project(rows, leading_directions(rows, self.rank, self.steps), tensor.dtype)

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Coefficients times basis."""
        return (residuals[0] @ residuals[1].t()).view(like.shape)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The norm of the tensor: a projection makes nothing longer."""
        norm: torch.Tensor = tensor.to(torch.float64).norm()
        return norm * (1 + 8 * torch.finfo(tensor.dtype).eps * self.rank)
