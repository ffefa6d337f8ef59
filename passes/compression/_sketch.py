"""Random sketches S of tall matrices: k rows for N, E[Sᵀ S] = I, made anew from (seed, step, rank) at every use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from graphrewrite import random

Sketch = Callable[[torch.Tensor, int, torch.Tensor, Any], torch.Tensor]
"""`(counter, stream, rows, k) -> S rows` for `rows` of shape (N, n)."""


def gaussian(counter: torch.Tensor, stream: int, rows: torch.Tensor, k: Any) -> torch.Tensor:
    """Entries N(0, 1/k)."""
    return _dense(random.normal(counter, stream, [k, rows.shape[0]], work_dtype(rows.dtype)), rows, k)


def rademacher(counter: torch.Tensor, stream: int, rows: torch.Tensor, k: Any) -> torch.Tensor:
    """Entries ±1/√k."""
    return _dense(random.signs(counter, stream, [k, rows.shape[0]], work_dtype(rows.dtype)), rows, k)


def row_sampling(counter: torch.Tensor, stream: int, rows: torch.Tensor, k: Any) -> torch.Tensor:
    """Of the rows k, without replacement, times √(N/k)."""
    found: torch.Tensor = rows.index_select(0, _chosen(counter, stream, rows, k)) * _root(rows.shape[0], k)
    return found


def dct(counter: torch.Tensor, stream: int, rows: torch.Tensor, k: Any) -> torch.Tensor:
    """Random signs, then k rows of the orthonormal discrete cosine transform, without replacement, times √(N/k)."""
    count, work = rows.shape[0], work_dtype(rows.dtype)
    number = _chosen(counter, stream, rows, k)
    place = torch.arange(count, device=rows.device)
    # reduced to one period as integers: the cosine of a large number would lose digits
    phase = torch.remainder(number[:, None] * (2 * place + 1)[None, :], 4 * count).to(torch.float64)
    basis = torch.cos(phase * math.pi / (2 * count)) * math.sqrt(2.0)
    # the constant row is shorter by the square root of two
    basis = basis - (1.0 - math.sqrt(0.5)) * math.sqrt(2.0) * (number == 0).to(torch.float64)[:, None]
    basis = basis.to(work) * _signs(counter, stream, rows, work)[None, :]
    return _dense(basis, rows, k)


def fft(counter: torch.Tensor, stream: int, rows: torch.Tensor, k: Any) -> torch.Tensor:
    """Random signs, then k rows of the orthonormal Hartley transform (real FFT), without replacement, times √(N/k)."""
    work = work_dtype(rows.dtype)
    signed = rows.to(work) * _signs(counter, stream, rows, work)[:, None]
    spectrum = torch.fft.fft(signed, dim=0, norm="ortho")
    hartley = spectrum.real - spectrum.imag
    chosen = hartley.index_select(0, _chosen(counter, stream, rows, k))
    found: torch.Tensor = (chosen * _root(rows.shape[0], k)).to(rows.dtype)
    return found


SKETCHES: dict[str, Sketch] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
    "dct": dct,
    "fft": fft,
    "rows": row_sampling,
}


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(matrix: torch.Tensor, rows: torch.Tensor, k: Any) -> torch.Tensor:
    found: torch.Tensor = ((matrix @ rows.to(matrix.dtype)) * _root(1, k)).to(rows.dtype)
    return found


def _chosen(counter: torch.Tensor, stream: int, rows: torch.Tensor, k: Any) -> torch.Tensor:
    """Different row numbers, k of them, uniformly: the places of the k smallest of N random words."""
    return random.bits(counter, stream, [rows.shape[0]]).argsort(stable=True)[:k]


def _signs(counter: torch.Tensor, stream: int, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # the words behind those that choose the rows
    count = rows.shape[0]
    return random.signs(counter, stream, [2 * count], dtype)[count:]


def _root(count: Any, k: Any) -> Any:
    return (count / k) ** 0.5
