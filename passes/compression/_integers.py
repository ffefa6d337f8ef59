"""Group-wise integer quantisation: what `int8`, `int4` and `int2` are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from graphrewrite.passes.compression._packing import (
    from_groups,
    pack,
    round_down,
    round_up,
    scale_dtype,
    to_groups,
    unpack,
    work_dtype,
)

from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Draw, SavedCodec

SLACK = 1.02
"""Rounding of the arithmetic itself, on top of half a step."""


@dataclass(frozen=True)
class GroupedInteger(SavedCodec):
    """Codes of a few bits, with a scale and a minimum for each group of elements.

    A group is that many elements in row-major order. With x in [lo, hi], L = 2^b - 1 and s = (hi - lo) / L the code is
    round((x - lo) / s), and x^ = lo + s * code. Symmetric: s = max |x| / (2^(b-1) - 1) and x^ = s * code; 0 stays 0.
    Stochastic rounding is floor(. + u) with u uniform on [0, 1): E x^ = x. Scale and minimum are stored in bfloat16
    (float32 for float64), rounded outwards, so that no element is clipped.

    A group that holds an infinity or a NaN, or whose range overflows, decodes to NaN.

    Args:
        group: Elements that share a scale.
        symmetric: No minimum is stored.
        rounding: `"nearest"` or `"stochastic"`.
    """

    group: int = 128
    symmetric: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"

    width: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.group < 1:
            raise RuleError(f"{self.name}: group={self.group} is no number of elements", remedy="use 32 to 256")
        if self.rounding not in ("nearest", "stochastic"):
            raise RuleError(
                f"{self.name}: rounding={self.rounding!r} is unknown", remedy="use 'nearest' or 'stochastic'"
            )

    @property
    def random(self) -> bool:
        """Stochastic rounding draws one number per element."""
        return self.rounding == "stochastic"

    @property
    def passes(self) -> float:  # type: ignore[override]
        """Without minima there is less to reduce and to add."""
        return 11.0 if self.symmetric else 16.0

    @property
    def _levels(self) -> int:
        return (1 << (self.width - 1)) - 1 if self.symmetric else (1 << self.width) - 1

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """The codes, and the group's share of its scale and minimum."""
        numbers = 1 if self.symmetric else 2
        return self.width + numbers * 8 * scale_dtype(dtype).itemsize / self.group

    def encode(self, tensor: torch.Tensor, *, draw: Draw | None = None) -> Sequence[torch.Tensor]:
        """Packed codes, the scales, and the minima unless symmetric."""
        rows = to_groups(tensor, self.group).to(work_dtype(tensor.dtype))
        low, step = self._grid(rows, scale_dtype(tensor.dtype))
        divisor = torch.where(step == 0, 1.0, step).to(rows.dtype)
        codes = rows / divisor[:, None]
        if low is not None:
            codes = codes - (low.to(rows.dtype) / divisor)[:, None]
        if self.rounding == "nearest":
            codes = codes.round()
        elif draw is None:
            raise RuleError(
                f"{self.name}: stochastic rounding needs numbers to draw",
                remedy="pass draw=lambda size: graphrewrite.random.uniform(counter, stream, size)",
            )
        else:
            codes = (codes + draw(list(rows.shape)).to(rows.dtype)).floor()
        if low is None:
            codes = codes + self._levels
        codes = codes.clamp(0, self._levels if low is not None else 2 * self._levels)
        packed = pack(codes.to(torch.uint8), self.width)
        return [packed, step] if low is None else [packed, step, low]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Minimum plus code times scale."""
        dtype = work_dtype(like.dtype)
        step = residuals[1]
        codes = unpack(residuals[0], self.width, step.shape[0] * self.group).view(step.shape[0], self.group).to(dtype)
        if self.symmetric:
            rows = (codes - self._levels) * step.to(dtype)[:, None]
        else:
            rows = torch.addcmul(residuals[2].to(dtype)[:, None], codes, step.to(dtype)[:, None])
        if like.dtype == torch.float16:
            rows = rows.clamp(-65504.0, 65504.0)
        return from_groups(rows, like)

    def _grid(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Minimum (None if symmetric) and scale of each group, as they are stored."""
        if self.symmetric:
            top = rows.abs().amax(1)
            return None, round_up(top / self._levels + top * 0, dtype)
        low, high = rows.amin(1), rows.amax(1)
        stored = round_down(low, dtype)
        # what is not finite makes the scale NaN, and with it the whole group
        return stored, round_up((high - stored.to(low.dtype)) / self._levels + (high - low) * 0, dtype)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Half a step (a whole one if stochastic) of the element's group, and the rounding to its own dtype."""
        rows = to_groups(tensor, self.group).to(torch.float64)
        _, step = self._grid(rows.to(work_dtype(tensor.dtype)), scale_dtype(tensor.dtype))
        within = (0.5 if self.rounding == "nearest" else 1.0) * SLACK * step.to(torch.float64)[:, None]
        cast = rows.abs() * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).smallest_normal
        limit = within * (1 + torch.finfo(tensor.dtype).eps) + cast
        return from_groups(limit, torch.empty(tensor.shape, dtype=torch.float64))
