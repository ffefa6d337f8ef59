"""Store saved tensors in 8-bit floating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graphrewrite.passes.compression._packing import from_groups, round_up, scale_dtype, to_groups, work_dtype

from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import SavedCodec

_FORMATS = {
    "e4m3": (torch.float8_e4m3fn, 448.0, 2.0**-4, 2.0**-10),
    "e5m2": (torch.float8_e5m2, 57344.0, 2.0**-3, 2.0**-17),
}


@dataclass(frozen=True)
class Float8(SavedCodec):
    """Round x / s to 8-bit floating point, with s = max |x| / largest for each group of elements.

    Args:
        format: `"e4m3"` (3 bits of mantissa) or `"e5m2"` (2 bits, wider range).
        group: Elements that share a scale, in row-major order.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    group: int = 128

    name = "fp8"
    summary = "8-bit floating point with a scale for each group"
    paper = "FP8 Formats for Deep Learning (Micikevicius et al., 2022)"
    error = "relative, at most 2^-4 (e4m3) or 2^-3 (e5m2); absolute for elements far below the group's largest"

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise RuleError(f"fp8: format={self.format!r} is unknown", remedy="use 'e4m3' or 'e5m2'")
        if self.group < 1:
            raise RuleError(f"fp8: group={self.group} is no number of elements", remedy="use 32 to 256")

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """8, and the group's share of its scale."""
        return 8 + 8 * scale_dtype(dtype).itemsize / self.group

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The 8-bit numbers, and the scales."""
        rows = to_groups(tensor, self.group).to(work_dtype(tensor.dtype))
        step = self._step(rows, tensor.dtype)
        divisor = torch.where(step == 0, 1.0, step).to(rows.dtype)
        return [(rows / divisor[:, None]).to(_FORMATS[self.format][0]), step]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Number times scale."""
        dtype = work_dtype(like.dtype)
        rows = residuals[0].to(dtype) * residuals[1].to(dtype)[:, None]
        if like.dtype == torch.float16:
            rows = rows.clamp(-65504.0, 65504.0)
        return from_groups(rows, like)

    def _step(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        top = rows.abs().amax(1)
        # what is not finite makes the scale NaN, and with it the whole group
        return round_up(top / _FORMATS[self.format][1] + top * 0, scale_dtype(dtype))

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Half a unit in the last place, at least half the smallest number times the scale."""
        _, _, relative, absolute = _FORMATS[self.format]
        rows = to_groups(tensor, self.group)
        step = self._step(rows.to(work_dtype(tensor.dtype)), tensor.dtype).to(torch.float64)
        exact = rows.to(torch.float64).abs()
        own = exact * 2 * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).smallest_normal
        limit = torch.maximum(exact * relative, absolute * step[:, None]) * 1.01 + own
        return from_groups(limit, torch.empty(tensor.shape, dtype=torch.float64))
