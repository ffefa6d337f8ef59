"""Approx-BP: the derivative of a sum of ReLUs that approximates the activation itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from graphrewrite.passes.compression._regions import Region, find_regions
from graphrewrite.passes.compression._samples import Samples, Scalar, Table
from graphrewrite.passes.compression._table_backward import TableBackward, check_bits
from graphrewrite.passes.compression.tables import table

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.ops import ACTIVATIONS

aten = torch.ops.aten

PUBLISHED = {
    aten.gelu.default: (
        (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
        (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
    ),
    aten.silu.default: (
        (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
        (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
    ),
}
"""ReGELU2 and ReSiLU2: heights a and knots c of h(x) = Σ a_i max(x - c_i, 0)."""


@dataclass(frozen=True)
class ApproxBP(TableBackward):
    """Let the derivative of an activation be that of the continuous piecewise linear function nearest to it.

    The forward is exact. The backward's theory bounds the error of the gradient by the distance of the *primitives*:
    h(x) = Σ a_i max(x - c_i, 0) minimises ∫ (f - h)², and equals f's own straight lines far out. The derivative has
    2^bits levels; packed codes are all that is kept. With the published constants these are ReGELU2 and ReSiLU2.

    Args:
        bits: 1 to 4 per element; the published constants have 2.
        constants: `"published"`: those of the paper, for GELU and SiLU; `"derived"`: computed when the model is
            compiled, for every activation that ends in straight lines.
        always: Replace derivatives where that spares nothing, too.
    """

    bits: int = 2
    constants: Literal["published", "derived"] = "published"
    always: bool = False

    name = "approx_bp"
    summary = "the derivative of the nearest sum of ReLUs (ReGELU2, ReSiLU2), 2 bits kept per element"
    formula = "∂x = h′(x) · g,  h = Σ aᵢ max(x − cᵢ, 0) = argmin ∫ (f − h)²"
    paper = "Yang et al.: Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation, 2024"

    def requires(self, graph: JointGraph) -> None:
        """Known constants."""
        check_bits(self.name, self.bits)
        if self.constants not in ("published", "derived"):
            raise RuleError(f"approx_bp knows no constants={self.constants!r}", remedy="use 'published' or 'derived'")
        if self.constants == "published" and self.bits != 2:
            raise RuleError(f"the published constants are for 2 bits, not {self.bits}", remedy="use constants=derived")

    def regions(self, graph: JointGraph) -> Iterable[Region]:
        """The activations that constants are known for, or all scalar functions."""
        return find_regions(graph, written_out=self.constants == "derived")

    def takes(self, graph: JointGraph, region: Region) -> bool:
        """With published constants, the activations that have some; says so of the others."""
        target = region.result.target
        if self.constants == "derived" or target in PUBLISHED:
            return True
        if target in ACTIVATIONS:
            self.fail(graph, "no constants are published for it: constants=derived computes them", region.result)
        return False

    def table_of(self, region: Region) -> Table:
        """The published table, or the derived one."""
        if self.constants == "published":
            return published_table("gelu" if region.result.target is aten.gelu.default else "silu")
        return table(region, self.bits, objective="primitive", pinned=True, key=region.key)


@functools.cache
def published_table(name: Literal["gelu", "silu"]) -> Table:
    """ReGELU2 or ReSiLU2 as a table, with its errors under the uniform weight."""
    functions: dict[str, Scalar] = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
    heights, knots = PUBLISHED[aten.gelu.default if name == "gelu" else aten.silu.default]
    levels = np.concatenate([[0.0], np.cumsum(heights)])
    error, primitive = Samples.of(functions[name], "uniform", name).errors(np.array(knots), levels)
    return Table(2, knots, (0, 1, 2, 3), tuple(levels.tolist()), error, primitive)
