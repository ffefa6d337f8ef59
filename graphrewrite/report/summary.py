"""What `compiled.report()` returns: passes, saved values, certificates, backend coverage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphrewrite.analysis.certificates import Certificates, certify
from graphrewrite.graph.aliasing import base_of
from graphrewrite.graph.nodes import info, is_getitem, value
from graphrewrite.graph.partition import Partition, Saved
from graphrewrite.graph.text import Names, operator_name
from graphrewrite.pipeline import PassRecord
from graphrewrite.runtime.program import Program


@dataclass(frozen=True)
class SavedRow:
    """One value that lives between the forward and the backward.

    Attributes:
        name: Its node.
        module: Module path that computed it.
        block: Its block.
        operator: What computed it.
        type: dtype and shape.
        nbytes: Bytes at the example's sizes; 0 for inputs, parameters and sizes, which are referenced.
        kind: `"activation"`, `"input"` (an input, parameter or buffer), `"gradient"` (computed early) or `"size"`.
        born: The operator that computes it, counted in the order in which they run (as `schedule` does).
        dies: The last operator that reads it.
    """

    name: str
    module: str
    block: str
    operator: str
    type: str
    nbytes: int
    kind: str
    born: int = 0
    dies: int = 0


@dataclass(frozen=True)
class Report:
    """A summary of one compiled program; `str(report)` is made to be read."""

    rule: str
    backend: str
    passes: tuple[PassRecord, ...]
    saved: tuple[SavedRow, ...]
    certificates: Certificates
    backend_coverage: dict[str, int]
    guards: tuple[str, ...]
    notes: tuple[tuple[str, str, str], ...] = ()

    @property
    def saved_bytes(self) -> int:
        """Bytes held between the forward and the backward, parameters and inputs excluded."""
        return sum(row.nbytes for row in self.saved)

    def __str__(self) -> str:
        lines = [f"rule {self.rule}, backend {self.backend}", "", str(self.certificates), ""]
        stored = [row for row in self.saved if row.nbytes]
        lines.append(f"saved between forward and backward: {self.saved_bytes:,} bytes in {len(stored)} tensors")
        lines += [
            f"  {row.nbytes:>12,}  {row.type:<24} {row.operator:<28} {row.module or row.block} ({row.kind})"
            for row in sorted(stored, key=lambda r: -r.nbytes)[:20]
        ]
        if len(stored) > 20:
            lines.append(f"  ... and {len(stored) - 20} more")
        lines += ["", "passes"]
        for record in self.passes:
            change = f"{record.nodes_before} -> {record.nodes_after} nodes" if record.modified else "nothing to do"
            lines.append(f"  {record.text:<40} {record.level:<9} {record.seconds * 1e3:8.1f} ms  {change}")
        lines += ["", "holds for: " + ("; ".join(self.guards) or "every input of these dtypes and ranks")]
        return "\n".join(lines) + "\n"


def summarise(program: Program, rule: str, backend: str) -> Report:
    """The report of a program."""
    part = program.partition
    names = Names(part.graph)
    born, dies = _lifetimes(part)
    rows = [_row(one, names, born, dies) for one in part.saved]
    operators = sum(1 for n in part.graph.nodes if n.op == "call_function")
    return Report(
        rule,
        backend,
        tuple(program.history),
        tuple(rows),
        certify(part),
        {backend: operators},
        tuple(program.guard_text),
        tuple(program.operator.log.entries),
    )


def _lifetimes(part: Partition) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """For the owners of memory: the operators that compute them, and the last ones that read them."""
    born: dict[fx.Node, int] = {}
    dies: dict[fx.Node, int] = {}
    step = -1
    for node in (n for nodes in part.order.values() for n in nodes):
        step += not is_getitem(node)
        born[node] = step
        for source in node.all_input_nodes:
            dies[base_of(source)] = step
    for one in part.graph.outputs.values():
        # what is returned stays to the end
        dies[base_of(one)] = max(step, 0)
    return born, dies


def _row(one: Saved, names: Names, born: dict[fx.Node, int], dies: dict[fx.Node, int]) -> SavedRow:
    own = info(one.node)
    return SavedRow(
        names[one.node],
        own.module,
        own.block,
        str(own.spec) if one.is_input else operator_name(_operator(one.node)),
        names.type(value(one.node)),
        one.nbytes,
        _kind(one.is_input, one.carried, one.nbytes),
        born.get(one.node, 0),
        dies.get(base_of(one.node), 0),
    )


def _operator(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else None
    return source if operator_name(node) == "getitem" and isinstance(source, fx.Node) else node


def _kind(is_input: bool, carried: bool, nbytes: int) -> str:
    if is_input:
        return "input"
    if carried:
        return "gradient"
    return "activation" if nbytes else "size"
