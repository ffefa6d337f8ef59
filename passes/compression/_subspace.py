"""Saved rows projected on a few directions: what `lowrank` and `velora` share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.graph.codec import Declined
from graphrewrite.graph.nodes import fixed, value


def leading_directions(rows: torch.Tensor, rank: int, steps: int) -> torch.Tensor:
    """An orthonormal basis, width x rank, near the space of the largest singular values: subspace iteration.

    It starts from cosines, so that the same rows give the same basis.
    """
    width = rows.shape[1]
    places = torch.arange(width, dtype=rows.dtype, device=rows.device)
    orders = torch.arange(rank, dtype=rows.dtype, device=rows.device)
    basis = torch.cos(math.pi / width * (places[:, None] + 0.5) * orders[None, :])
    rows = scaled(rows)
    for _ in range(steps):
        basis = orthonormal(rows.t() @ (rows @ basis))
    return basis


def scaled(rows: torch.Tensor) -> torch.Tensor:
    """Divided by the largest magnitude: products of the numbers neither overflow nor vanish."""
    if rows.numel() == 0:
        return rows
    return rows / rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """The Q of a QR decomposition; columns that vanish or are not finite give what is not finite or any direction."""
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def project(rows: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Coefficients, and the basis."""
    return [(rows @ basis).to(dtype), basis.to(dtype)]


def width_of(saved: SavedValue, rank: int, groups: int = 1) -> int | Declined:
    """The width of the rows that are projected, or why they cannot be."""
    shape = value(saved.node).shape
    last = fixed(shape[-1]) if len(shape) >= 2 else None
    if last is None:
        return Declined("its last dimension has no fixed size")
    if last % groups:
        return Declined(f"{last} features do not split into groups={groups}")
    if last // groups <= rank:
        return Declined(f"rows of {last // groups} are not wider than rank={rank}")
    return last // groups
