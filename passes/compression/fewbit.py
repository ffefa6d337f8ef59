"""Few-bit derivatives of activations: codes of 1 to 4 bits are kept in the place of the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from graphrewrite.passes.compression._approximate import ApproximateBackward, use_table
from graphrewrite.passes.compression._regions import Region, find_regions, read_by, readers
from graphrewrite.passes.compression._samples import Table
from graphrewrite.passes.compression.tables import table
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import info


@dataclass(frozen=True)
class FewBit(ApproximateBackward):
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

    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """Every scalar function of the forward."""
        count = 0
        for region in find_regions(graph, written_out=self.written_out):
            if wanted(region.result) and self._take(graph, region):
                count += 1
        return count

    def _take(self, graph: JointGraph, region: Region) -> bool:
        if not all(self.untouched(graph, node) for node in region.operators):
            return False
        kept = None if self.always else kept_anyway(graph, region)
        if kept == "":
            return False
        if kept is not None:
            self.fail(graph, kept, region.result)
            return False
        try:
            found = self.table_of(region)
        except RuleError as error:
            if self.named(region.result):
                raise located(error, region.result) from error
            self.fail(graph, error.message, region.result)
            return False
        if not found.borders:
            return False
        use_table(graph, region, found)
        return True

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


def check_bits(name: str, bits: int) -> None:
    """Refuse what no table has."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 4:
        raise RuleError(f"{name}{{bits={bits}}} is out of range", remedy="codes have 1 to 4 bits")


def located(error: RuleError, node: fx.Node) -> RuleError:
    """The same error, with the place in the model."""
    own = info(node)
    return RuleError(error.message, node=node.name, module=own.module, source=own.source, remedy=error.remedy)


def kept_anyway(graph: JointGraph, region: Region) -> str | None:
    """Why replacing a derivative would spare nothing: what it reads, others keep; None if it spares something.

    "" stands for a derivative that keeps nothing: a linear function.
    """
    inside = set(region.operators)
    reads = {base for node in region.operators for base in read_by(graph, node)}
    if not reads:
        return ""
    reasons = []
    for held in reads:
        others = [op for op in readers(graph, held) if op not in inside]
        if held.op == "placeholder":
            reasons.append("it reads an input, which is not stored")
        elif not others:
            return None
        else:
            reasons.append(f"%{others[0].name} keeps %{held.name}, which is what its derivative reads")
    return "; ".join(reasons)
