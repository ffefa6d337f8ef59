"""What takes the place of functions of passes and rules in graphs for the Triton backend: one operator of ours each.

A pass asks the graph for the form of a function (`graph.context.form(steps)`) before it traces it. What comes back
computes the same: codes bit by bit, floating-point results up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from graphrewrite.backends.triton.support import unavailable
from graphrewrite.passes.compression import _sketch as _sketches
from graphrewrite.passes.compression import _table_backward, ms_norm
from graphrewrite.passes.compression._samples import Table
from graphrewrite.passes.rules import _feedback, _forward_forward, _local

ours = torch.ops.graphrewrite


def _coded(x: torch.Tensor, table: Table) -> torch.Tensor:
    found: torch.Tensor = ours.few_bit_codes(x, list(table.borders), list(table.codes), table.bits)
    return found


def _looked_up(cotangent: torch.Tensor, stored: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    found: torch.Tensor = ours.few_bit_backward(cotangent, stored, levels, bits)
    return found


def _measured(
    x: torch.Tensor, _gamma: torch.Tensor | None, _beta: torch.Tensor | None, eps: float, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    z, over = ours.ms_norm(x, 1, eps, not centred)
    return z, over


def _pulled_back(q: torch.Tensor, z: torch.Tensor, over: torch.Tensor, centred: bool) -> torch.Tensor:
    found: torch.Tensor = ours.ms_norm_backward(q, z, over, 1, not centred)
    return found


def _sketch(distribution: str) -> _sketches.Sketch:
    def sketch(counter: torch.Tensor, stream: int, rows: torch.Tensor, k: Any) -> torch.Tensor:
        # (k, N) numbers by rows, read as the transposed matrix behind the transposed rows
        product = ours.random_projection(rows.t(), counter, stream, k, distribution, 1.0, True)
        found: torch.Tensor = (product.t() * (1 / k) ** 0.5).to(rows.dtype)
        return found

    return sketch


def _rms_normalised(h: torch.Tensor) -> torch.Tensor:
    return _goodness(h)[1]


def _sum_of_squares(h: torch.Tensor) -> torch.Tensor:
    return _goodness(h)[0].to(h.dtype)


def _mean_square(h: torch.Tensor) -> torch.Tensor:
    return (_goodness(h)[0] / math.prod(h.shape[1:])).to(h.dtype)


def _goodness(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # goodness and normalisation of one output are one node, once equal calls are merged
    squares, out = ours.ff_goodness(h, _local.RMS_EPS)
    return squares, out


def _random_product(
    x: torch.Tensor, counter: torch.Tensor, stream: int, features: int, distribution: str, bound: float
) -> torch.Tensor:
    number = _feedback.same_at_every_step(counter)
    scale = bound if distribution == "uniform" else bound / math.sqrt(3.0)
    found: torch.Tensor = ours.random_projection(x, number, stream, features, distribution, scale, False)
    return found


def stand_ins() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By function; none where no kernel can run in this process."""
    if unavailable():
        return {}
    return {
        _table_backward.coded: _coded,
        _table_backward.looked_up: _looked_up,
        _sketches.gaussian: _sketch("normal"),
        _sketches.rademacher: _sketch("signs"),
        _local.rms_normalise: _rms_normalised,
        _forward_forward.sum_of_squares: _sum_of_squares,
        _forward_forward.mean_square: _mean_square,
        _feedback.random_product: _random_product,
        ms_norm.measured: _measured,
        ms_norm.pulled_back: _pulled_back,
    }
