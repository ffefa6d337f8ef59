"""Few-bit derivatives of activations: codes of 1 to 4 bits are kept in the place of the argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from graphrewrite.passes.compression._regions import Region, find_regions
from graphrewrite.passes.compression._samples import Table
from graphrewrite.passes.compression._table_backward import TableBackward, check_bits
from graphrewrite.passes.compression.tables import table

from graphrewrite.graph.joint import JointGraph


@dataclass(frozen=True)
class FewBit(TableBackward):
    """Give activations the best piecewise-constant derivative with 2^bits levels, and keep its packed codes.

    The forward is exact. The table is the optimum of a dynamic program (`tables`), made when the model is compiled and
    once per process. Every element-wise function of one tensor is taken: activation operators, and what a model writes
    out in element-wise steps, such as the GELU of GPT-2 or an activation of the user's own.

    A derivative that reads a value which the next operator keeps in any case (tanh in front of a linear layer) is left
    exact: codes would come on top. So are linear functions.

    Args:
        bits: 1 to 4 per element.
        weight: Where a table is to be good: `"uniform"` on [-20, 20], or `"normal"`, N(0, 1).
        objective: `"derivative"`: least squared error of the derivative; `"primitive"`: of its primitive, as Approx-BP.
        contiguous: Let each level serve one interval only, as the published tables do; by default a level serves as
            many intervals as it fits, which is never worse.
        written_out: Take activations written out in element-wise steps, too.
        always: Replace derivatives where that spares nothing, too.
    """

    bits: int = 3
    weight: Literal["uniform", "normal"] = "uniform"
    objective: Literal["derivative", "primitive"] = "derivative"
    contiguous: bool = False
    written_out: bool = True
    always: bool = False

    name = "fewbit"
    summary = "piecewise-constant derivatives of activations, 1 to 4 bits kept per element"
    formula = "∂x = levels[code(x)] · g,  levels = argmin ∫ (f′ − q)² w"
    paper = "Novikov et al.: Few-Bit Backward: Quantized Gradients of Activation Functions, 2022"

    def requires(self, graph: JointGraph) -> None:
        """Codes of 1 to 4 bits."""
        check_bits(self.name, self.bits)

    def regions(self, graph: JointGraph) -> Iterable[Region]:
        """Every scalar function of the forward."""
        return find_regions(graph, written_out=self.written_out)

    def table_of(self, region: Region) -> Table:
        """The table of a scalar function."""
        return table(
            region,
            self.bits,
            weight=self.weight,
            objective=self.objective,
            contiguous=self.contiguous,
            key=region.key,
        )
