"""Codes whose levels are the least-squares optimum for the distribution of what is stored."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from graphrewrite.passes.compression._packing import from_groups, pack, to_groups, unpack, work_dtype

from graphrewrite.analysis.demands import SavedValue
from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Declined, SavedCodec
from graphrewrite.graph.nodes import flat_inputs, producer
from graphrewrite.graph.text import operator_name

Shape = Literal["normal", "rectified", "gated"]

LEVELS: dict[tuple[str, int], tuple[float, ...]] = {
    ("normal", 2): (-0.46383, 0.0, 0.33626, 0.79797),
    ("normal", 3): (-0.72361, -0.43108, -0.20373, 0.0, 0.17826, 0.37158, 0.60256, 0.92882),
    ("normal", 4): (
        *(-0.85468, -0.67532, -0.53078, -0.40725, -0.29623, -0.19366, -0.09575, 0.0),
        *(0.08934, 0.18102, 0.27674, 0.37817, 0.48991, 0.61645, 0.76843, 0.9655),
    ),
    ("rectified", 2): (0.0, 0.22159, 0.50474, 0.89457),
    ("rectified", 3): (-0.06399, 0.0, 0.10656, 0.22966, 0.3691, 0.52859, 0.71773, 0.95565),
    ("rectified", 4): (
        *(-0.0963, -0.06369, -0.03566, 0.0, 0.05145, 0.10761, 0.16786, 0.23206),
        *(0.29998, 0.37255, 0.45062, 0.53466, 0.62641, 0.72848, 0.84356, 0.9729),
    ),
    ("gated", 2): (-0.3553, 0.0, 0.25375, 0.91035),
    ("gated", 3): (-0.66354, -0.31872, -0.12002, 0.0, 0.10287, 0.26464, 0.52475, 0.9595),
    ("gated", 4): (
        *(-0.83115, -0.60401, -0.42943, -0.29604, -0.19252, -0.11172, -0.04854, 0.0),
        *(0.04477, 0.10205, 0.17372, 0.26399, 0.37998, 0.5292, 0.7214, 0.97362),
    ),
}
"""Levels of x / s that minimise the squared error of x in groups of 32, with one level at 0.

normal: x normal; rectified: x = gelu(normal); gated: x = silu(0.6 normal) times another normal.
"""

_RECTIFIED = frozenset({"relu", "gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "hardswish", "relu6"})
_STEPS = 16.0
_LOWEST = 127.0


@dataclass(frozen=True)
class Lloyd(SavedCodec):
    """The nearest of 2^b levels times a scale for each group, where the levels fit what the value is.

    The scale s is the element of the largest magnitude, with its sign, so that x / s reaches 1 but seldom -1. It is
    stored in 8 bits: its sign, and how many sixteenths of an octave |s| is below the largest one of the tensor, rounded
    so that no element exceeds it. Scales more than 2^-7.9 below are stored as that.

    Levels are Lloyd-Max levels under squared error, one of them 0: of a normal distribution, or of what a rectifying
    activation (GELU, SiLU, ReLU, ...) or a product of two values makes of it. What computes a value says which.

    An infinity or a NaN makes the whole tensor NaN.

    Args:
        bits: 2, 3 or 4.
        group: Elements that share a scale, in row-major order.
        shape: `"normal"`, `"rectified"`, `"gated"`; `"auto"`: by the operator that computes the value.
    """

    bits: int = 4
    group: int = 32
    shape: Literal["auto", "normal", "rectified", "gated"] = "auto"

    name = "lloyd"
    summary = "2 to 4 bits with the levels that suit what computes the value"
    paper = "Lloyd, 1982; QLoRA (Dettmers et al., 2023) for levels of a normal distribution"
    error = "at most half the widest gap between levels, times the largest element of the group"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise RuleError(f"lloyd: bits={self.bits} is not 2, 3 or 4", remedy="use int8 for more")
        if self.group < 1:
            raise RuleError(f"lloyd: group={self.group} is no number of elements", remedy="use 16 to 64")
        if self.shape not in ("auto", "normal", "rectified", "gated"):
            raise RuleError(
                f"lloyd: shape={self.shape!r} is unknown", remedy="use 'auto', 'normal', 'rectified' or 'gated'"
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels, ascending."""
        return LEVELS["normal" if self.shape == "auto" else self.shape, self.bits]

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """With the levels for what computes the value."""
        declined = super().fit(saved)
        if self.shape != "auto" or isinstance(declined, Declined):
            return declined
        return replace(self, shape=_shape_of(saved))

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """The codes, and the group's share of its scale."""
        return self.bits + 8 / self.group

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Packed codes, the groups' scales as bytes, and the tensor's largest."""
        rows = to_groups(tensor, self.group).to(work_dtype(tensor.dtype))
        below, largest = self._scales(rows)
        levels = self._constant(rows)
        borders = (levels[1:] + levels[:-1]) / 2
        step = _decoded(below, largest)
        # where everything is 0 there is nothing to divide by
        scaled = rows / torch.where(step == 0, 1.0, step)[:, None]
        codes = torch.bucketize(scaled, borders, out_int32=True)
        return [pack(codes.to(torch.uint8), self.bits), below, largest]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Level times scale."""
        packed, below, largest = residuals
        count = below.shape[0]
        codes = unpack(packed, self.bits, count * self.group).view(count, self.group).to(torch.int32)
        step = _decoded(below, largest)
        rows = self._constant(largest)[codes] * step[:, None]
        if like.dtype == torch.float16:
            rows = rows.clamp(-65504.0, 65504.0)
        return from_groups(rows, like)

    def _constant(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.levels, dtype=like.dtype, device=like.device)

    @staticmethod
    def _scales(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each group a byte, sign and sixteenths of an octave below the largest scale, and that one."""
        low, high = rows.amin(1), rows.amax(1)
        negative = -low > high
        top = torch.where(negative, -low, high)
        # one more element: a tensor may have no group
        largest = torch.cat([top, top.new_zeros(1)]).amax()
        octaves = torch.log2(largest.clamp_min(torch.finfo(rows.dtype).tiny)) - torch.log2(
            top.clamp_min(torch.finfo(rows.dtype).tiny)
        )
        below = (octaves * _STEPS - 1e-3).floor().clamp(0, _LOWEST)
        code = torch.where(below.isnan(), 0.0, below) + 128.0 * negative.to(below.dtype)
        # what is not finite makes the largest scale NaN, and with it everything
        return code.to(torch.uint8), largest + largest * 0

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Half the widest gap, or what lies outside of the levels, times the group's scale."""
        rows = to_groups(tensor, self.group).to(work_dtype(tensor.dtype))
        step = _decoded(*self._scales(rows)).abs().to(torch.float64)[:, None]
        levels = self.levels
        gaps = [(b - a) / 2 for a, b in itertools.pairwise(levels)]
        widest = max(*gaps, 1 + levels[0], 1 - levels[-1])
        own = rows.to(torch.float64).abs() * 4 * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).tiny
        limit = step * widest * 1.001 + own
        return from_groups(limit, torch.empty(tensor.shape, dtype=torch.float64))


def _decoded(below: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The scales, with their signs."""
    number = below.to(largest.dtype)
    negative = number >= 128
    octaves = (number - 128.0 * negative.to(number.dtype)) / _STEPS
    size = largest * torch.exp2(-octaves)
    return torch.where(negative, -size, size)


def _shape_of(saved: SavedValue) -> Shape:
    made = producer(saved.node)
    name = operator_name(made)
    if name in _RECTIFIED:
        return "rectified"
    inputs = flat_inputs(made)
    if name == "mul" and len(inputs) == 2 and inputs[0] is not inputs[1]:
        shapes = [tuple(node.meta["val"].shape) for node in inputs]
        if shapes[0] == shapes[1]:
            return "gated"
    return "normal"
