"""Codes whose levels are the least-squares optimum for what activations look like."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graphrewrite.passes.compression._packing import from_groups, pack, to_groups, unpack, work_dtype

from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import SavedCodec

LEVELS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    2: ((-0.4424, 0.0, 0.3289, 0.8033), (-0.1476, 0.0, 0.3218, 0.8083)),
    3: (
        (-0.701, -0.4071, -0.1869, 0.0, 0.1617, 0.3529, 0.5854, 0.9146),
        (-0.2093, -0.0843, 0.0, 0.1205, 0.2666, 0.4386, 0.6488, 0.9288),
    ),
    4: (
        (
            *(-0.8333, -0.6504, -0.5039, -0.3808, -0.2721, -0.1718, -0.079, 0.0),
            *(0.0742, 0.162, 0.2571, 0.3596, 0.4725, 0.6003, 0.7533, 0.9467),
        ),
        (
            *(-0.2609, -0.1686, -0.0993, -0.0447, 0.0, 0.0488, 0.1065, 0.1698),
            *(0.2386, 0.3128, 0.393, 0.4799, 0.5759, 0.684, 0.8071, 0.951),
        ),
    ),
}
"""Levels of x / s for groups with two sides, and for groups with one: least squares over groups of 32 of normal values,
of GELU, SiLU and ReLU of them, and of products of the kind silu(a) b; one level is 0.
"""

ONE_SIDED = -0.35
"""A group of which no x / s is below this is one-sided."""
_STEPS, _LOWEST = 8.0, 63.0


@dataclass(frozen=True)
class Lloyd(SavedCodec):
    """The nearest of 2^b levels times a scale, with one of two sets of levels for each group.

    The scale s is the element of the largest magnitude, with its sign, so that x / s reaches 1 but seldom -1. What
    GELU, SiLU or ReLU return has small elements on the other side or none: such groups get levels of their own. A byte
    holds the sign of s, which levels, and how many eighths of an octave |s| is below the largest one of the tensor,
    rounded so that no element exceeds it. Scales more than 2^-7.9 below are stored as that.

    An infinity or a NaN makes the whole tensor NaN.

    Args:
        bits: 2, 3 or 4.
        group: Elements that share a scale, in row-major order.
    """

    bits: int = 4
    group: int = 32

    name = "lloyd"
    summary = "2 to 4 bits with least-squares levels, chosen per group"
    paper = "Lloyd, 1982; QLoRA (Dettmers et al., 2023) for levels of a normal distribution"
    error = "at most half the widest gap between levels, times the largest element of the group"

    def __post_init__(self) -> None:
        if self.bits not in LEVELS:
            raise RuleError(f"lloyd: bits={self.bits} is not 2, 3 or 4", remedy="use int8 for more")
        if self.group < 1:
            raise RuleError(f"lloyd: group={self.group} is no number of elements", remedy="use 16 to 64")

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """The codes, and the group's byte."""
        return self.bits + 8 / self.group

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Packed codes, the groups' bytes, and the tensor's largest."""
        rows = to_groups(tensor, self.group).to(work_dtype(tensor.dtype))
        byte, largest = self._scales(rows)
        step, one_sided = _decoded(byte, largest)
        # where everything is 0 there is nothing to divide by
        scaled = rows / torch.where(step == 0, 1.0, step)[:, None]
        both, one = (self._borders(side, rows) for side in (0, 1))
        codes = torch.where(
            one_sided[:, None],
            torch.bucketize(scaled, one, out_int32=True),
            torch.bucketize(scaled, both, out_int32=True),
        )
        return [pack(codes.to(torch.uint8), self.bits), byte, largest]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Level times scale."""
        packed, byte, largest = residuals
        count = byte.shape[0]
        codes = unpack(packed, self.bits, count * self.group).view(count, self.group).to(torch.int32)
        step, one_sided = _decoded(byte, largest)
        both, one = LEVELS[self.bits]
        levels = torch.tensor([*both, *one], dtype=largest.dtype, device=largest.device)
        rows = levels[codes + one_sided.to(torch.int32)[:, None] * len(both)] * step[:, None]
        if like.dtype == torch.float16:
            rows = rows.clamp(-65504.0, 65504.0)
        return from_groups(rows, like)

    def _borders(self, side: int, like: torch.Tensor) -> torch.Tensor:
        found = [(a + b) / 2 for a, b in itertools.pairwise(LEVELS[self.bits][side])]
        return torch.tensor(found, dtype=like.dtype, device=like.device)

    @staticmethod
    def _scales(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each group its byte; and the largest scale."""
        low, high = rows.amin(1), rows.amax(1)
        negative = -low > high
        top, other = torch.where(negative, -low, high), torch.where(negative, -high, low)
        # one more element: a tensor may have no group
        largest = torch.cat([top, top.new_zeros(1)]).amax()
        tiny = torch.finfo(rows.dtype).tiny
        octaves = torch.log2(largest.clamp_min(tiny)) - torch.log2(top.clamp_min(tiny))
        below = (octaves * _STEPS - 1e-3).floor().clamp(0, _LOWEST)
        marks = 128.0 * negative.to(rows.dtype) + 64.0 * (other > ONE_SIDED * top).to(rows.dtype)
        byte = torch.where(below.isnan(), 0.0, below) + marks
        # what is not finite makes the largest scale NaN, and with it everything
        return byte.to(torch.uint8), largest + largest * 0

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Half the widest gap, or what lies outside of the levels, times the group's scale."""
        rows = to_groups(tensor, self.group).to(work_dtype(tensor.dtype))
        step, one_sided = _decoded(*self._scales(rows))
        reach = [
            max(*((b - a) / 2 for a, b in itertools.pairwise(levels)), levels[0] - lowest, 1 - levels[-1])
            for levels, lowest in zip(LEVELS[self.bits], (-1.0, ONE_SIDED), strict=True)
        ]
        size = step.abs().to(torch.float64) * torch.where(one_sided, reach[1], reach[0])
        own = rows.to(torch.float64).abs() * 4 * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).tiny
        return from_groups(size[:, None] * 1.001 + own, torch.empty(tensor.shape, dtype=torch.float64))


def _decoded(byte: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales, with their signs, and which groups are one-sided."""
    octaves = (byte & 63).to(largest.dtype) / _STEPS
    size = largest * torch.exp2(-octaves)
    return torch.where(byte >= 128, -size, size), (byte & 64) > 0
