"""Two-bit group-wise codes of saved tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphrewrite.passes.compression._integers import GroupedInteger


@dataclass(frozen=True)
class Int2(GroupedInteger):
    """Group-wise 2-bit integers; see `GroupedInteger` for the formula and the options."""

    group: int = 64

    name = "int2"
    summary = "2-bit integers with a scale and a minimum for each group"
    paper = "ActNN (Chen et al., 2021), GACT (Liu et al., 2022)"
    error = "at most half a step, (max - min) / (2 * (2^2 - 1)); a whole one and unbiased with stochastic rounding"
    width: ClassVar[int] = 2
