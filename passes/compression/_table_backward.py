"""Common part of the passes that let a table stand for the derivative of scalar functions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from graphrewrite.passes.compression._approximate import ApproximateBackward, shared_constant
from graphrewrite.passes.compression._packing import pack, unpack
from graphrewrite.passes.compression._regions import Region, read_by, readers
from graphrewrite.passes.compression._samples import Table
from torch import fx

from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import info, value


class TableBackward(ApproximateBackward):
    """Give scalar functions a table's derivative where that spares something.

    The passes declare the option `always`: replace derivatives where that spares nothing, too.
    """

    always: bool

    @abstractmethod
    def regions(self, graph: JointGraph) -> Iterable[Region]:
        """The scalar functions to look at."""

    @abstractmethod
    def table_of(self, region: Region) -> Table:
        """The table of a scalar function.

        Raises:
            RuleError: There is none.
        """

    def takes(self, graph: JointGraph, region: Region) -> bool:
        """Whether a scalar function is one for this pass."""
        return True

    def rewrite(self, graph: JointGraph, wanted: Callable[[fx.Node], bool]) -> int:
        """Replace the derivatives of the wanted regions."""
        return sum(self._replace(graph, region) for region in self.regions(graph) if wanted(region.result))

    def _replace(self, graph: JointGraph, region: Region) -> bool:
        if not all(self.untouched(graph, node) for node in region.operators) or not self.takes(graph, region):
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


def use_table(graph: JointGraph, region: Region, table: Table) -> None:
    """Let the derivative of a scalar function be a table's: packed codes are all that is kept."""
    like = info(region.result).but(mirrors=None)
    argument = value(region.argument)
    code, look_up = graph.context.form(coded), graph.context.form(looked_up)
    packed: fx.Node = graph.splice(lambda x: code(x, table), [region.argument], like=like, whole=False)
    levels = _levels(graph, table, argument)

    def bwd(residuals: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> torch.Tensor:
        stored, held = residuals
        found: torch.Tensor = look_up(cotangent, stored, held, table.bits)
        return found

    graph.replace_vjp(region.result, bwd, residuals=[packed, levels], inputs=[region.argument])


def coded(x: torch.Tensor, table: Table) -> torch.Tensor:
    """The codes of all elements, packed."""
    return pack(encode(table, x), table.bits)


def looked_up(cotangent: torch.Tensor, stored: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    """The cotangent times the levels of packed codes."""
    codes = unpack(stored, bits, cotangent.numel()).to(torch.int32)
    return cotangent * levels.index_select(0, codes).view(cotangent.shape)


def encode(table: Table, x: torch.Tensor) -> torch.Tensor:
    """The code of each element, uint8: one comparison for each border. NaN has some code, whichever."""
    start = table.codes[0]
    found: torch.Tensor | None = None
    for border, before, after in zip(table.borders, table.codes, table.codes[1:], strict=False):
        height = abs(after - before)
        hit = x >= border if after > before else x < border
        start -= 0 if after > before else height
        if found is None or height > 1:
            hit = hit.to(torch.uint8)
        hit = hit * height if height > 1 else hit
        found = hit if found is None else found + hit
    assert found is not None
    # sums are right modulo 2^bits
    return found if start == 0 else (found + start % 2**table.bits) & (2**table.bits - 1)


def _levels(graph: JointGraph, table: Table, like: torch.Tensor) -> fx.Node:
    return shared_constant(graph, torch.tensor(table.levels, dtype=like.dtype, device=like.device), "levels")
