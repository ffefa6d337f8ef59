"""What `compiled.report()` returns: passes, saved values, certificates, backend coverage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphrewrite.analysis.certificates import Certificates, certify
from graphrewrite.analysis.liveness import backward_curve, forward_curve
from graphrewrite.graph.codec import Treatment
from graphrewrite.graph.nodes import info, value
from graphrewrite.graph.partition import Saved
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
        codec: Text form of the codec that the value is stored by; "" for one that is stored as it is. What is named is
            the value, `type` and `nbytes` are those of what is stored.
        kind: `"activation"`, `"input"` (an input, parameter or buffer), `"gradient"` (computed early) or `"size"`.
    """

    name: str
    module: str
    block: str
    operator: str
    type: str
    nbytes: int
    kind: str
    codec: str = ""


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
    plan: tuple[Treatment, ...] = ()
    """What compression did to each value that the backward reads; empty without `compress=` and `memory_budget=`."""
    predicted_peak: int = 0
    """The most bytes alive at once in a step, gradients included; parameters, buffers and the batch are not counted."""

    @property
    def saved_bytes(self) -> int:
        """Bytes held between the forward and the backward, parameters and inputs excluded."""
        return sum(row.nbytes for row in self.saved)

    def __str__(self) -> str:
        lines = [f"rule {self.rule}, backend {self.backend}", "", str(self.certificates), ""]
        stored = [row for row in self.saved if row.nbytes]
        lines.append(f"saved between forward and backward: {self.saved_bytes:,} bytes in {len(stored)} tensors")
        lines += [_row_line(row) for row in sorted(stored, key=lambda r: -r.nbytes)[:20]]
        if len(stored) > 20:
            lines.append(f"  ... and {len(stored) - 20} more")
        lines.append(f"peak of live bytes, predicted: {self.predicted_peak:,}")
        if self.plan:
            lines += ["", "plan: bytes before, bytes saved, predicted gradient error, treatment"]
            lines += [_plan_line(one) for one in sorted(self.plan, key=lambda t: -t.before)]
        lines += ["", "passes"]
        for record in self.passes:
            change = f"{record.nodes_before} -> {record.nodes_after} nodes" if record.modified else "nothing to do"
            lines.append(f"  {record.text:<40} {record.level:<9} {record.seconds * 1e3:8.1f} ms  {change}")
        lines += ["", "holds for: " + ("; ".join(self.guards) or "every input of these dtypes and ranks")]
        return "\n".join(lines) + "\n"


def _row_line(row: SavedRow) -> str:
    where = f"{row.module or row.block} ({row.codec or row.kind})"
    return f"  {row.nbytes:>12,}  {row.type:<24} {row.operator:<28} {where}"


def _plan_line(one: Treatment) -> str:
    error = "-" if one.error is None else f"{one.error:.2%}"
    where = one.module or one.block
    return f"  {one.before:>12,} -> {one.after:>10,}  {error:>7}  {one.codec:<20} {one.operator:<28} {where}"


def summarise(program: Program, rule: str, backend: str) -> Report:
    """The report of a program."""
    part = program.partition
    names = Names(part.graph)
    rows = [_row(one, names) for one in part.saved]
    operators = sum(1 for n in part.graph.nodes if n.op == "call_function")
    return Report(
        rule,
        backend,
        tuple(program.history),
        tuple(rows),
        certify(part),
        {backend: operators},
        tuple(program.guard_text),
        (*program.operator.log.entries, *part.graph.log.entries[len(program.operator.log.entries) :]),
        tuple(part.graph.treatments),
        max(forward_curve(part).peak, backward_curve(part).peak),
    )


def _row(one: Saved, names: Names) -> SavedRow:
    own = info(one.node)
    shown = own.encodes or one.node
    return SavedRow(
        names[shown],
        own.module,
        own.block,
        str(own.spec) if one.is_input else operator_name(_operator(shown)),
        names.type(value(one.node)),
        one.nbytes,
        _kind(one.is_input, one.carried, one.nbytes),
        own.codec,
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
