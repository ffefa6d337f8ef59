"""What `compiled.report()` returns: passes, saved values, certificates, backend coverage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graphrewrite.analysis.certificates import Certificates, certify
from graphrewrite.analysis.liveness import backward_curve, forward_curve
from graphrewrite.backends import Taken
from graphrewrite.graph.aliasing import base_of
from graphrewrite.graph.codec import Treatment
from graphrewrite.graph.nodes import info, is_getitem, value
from graphrewrite.graph.partition import Partition
from graphrewrite.graph.text import Names, operator_name
from graphrewrite.pipeline import PassRecord
from graphrewrite.runtime.program import Program

Lifetimes = tuple[dict[fx.Node, int], dict[fx.Node, int]]


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
    codec: str = ""


@dataclass(frozen=True)
class CoverageRow:
    """What runs one node.

    Attributes:
        name: The node.
        operator: What it computes.
        module: Module path that it belongs to.
        stage: `"forward"`, `"backward"` or `"weight"`.
        backend: What runs it.
        kernel: The kernel that does, or that was considered; "" for none.
        reason: Why not the backend that was asked for; "" if it does.
    """

    name: str
    operator: str
    module: str
    stage: str
    backend: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Report:
    """A summary of one compiled program; `str(report)` is made to be read."""

    rule: str
    backend: str
    passes: tuple[PassRecord, ...]
    saved: tuple[SavedRow, ...]
    certificates: Certificates
    coverage: tuple[CoverageRow, ...]
    guards: tuple[str, ...]
    notes: tuple[tuple[str, str, str], ...] = ()
    held: tuple[SavedRow, ...] = ()
    """What lives between the two stages of a split backward; kind `"cotangent"`: computed in the first of them."""
    plan: tuple[Treatment, ...] = ()
    """What compression did to each value that the backward reads; empty without `compress=` and `memory_budget=`."""
    predicted_peak: int = 0
    """The most bytes alive at once in a step, gradients included; parameters, buffers and the batch are not counted."""

    @property
    def saved_bytes(self) -> int:
        """Bytes held between the forward and the backward, parameters and inputs excluded."""
        return sum(row.nbytes for row in self.saved)

    @property
    def held_bytes(self) -> int:
        """Bytes held between the two stages of a split backward, parameters and inputs excluded."""
        return sum(row.nbytes for row in self.held)

    @property
    def not_split(self) -> tuple[str, ...]:
        """What a split backward could not move into its second stage, and why."""
        return tuple(dict.fromkeys(reason for by, _, reason in self.notes if by == "split_backward"))

    @property
    def backend_coverage(self) -> dict[str, int]:
        """How many nodes each backend runs; `coverage` has them one by one."""
        return dict(Counter(row.backend for row in self.coverage))

    def __str__(self) -> str:
        lines = [f"rule {self.rule}, backend {self.backend}", "", str(self.certificates), ""]
        lines += _values("saved between forward and backward", self.saved)
        lines.append(f"peak of live bytes, predicted: {self.predicted_peak:,}")
        if self.held:
            lines += ["", *_values("held between the two stages of the backward", self.held)]
        if self.not_split:
            lines += ["", "not split", *(f"  {reason}" for reason in self.not_split)]
        if self.plan:
            lines += ["", "plan: bytes before, bytes saved, predicted gradient error, treatment"]
            lines += [_plan_line(one) for one in sorted(self.plan, key=lambda t: -t.before)]
        lines += ["", "passes"]
        for record in self.passes:
            change = f"{record.nodes_before} -> {record.nodes_after} nodes" if record.modified else "nothing to do"
            lines.append(f"  {record.text:<40} {record.level:<9} {record.seconds * 1e3:8.1f} ms  {change}")
        lines += ["", *_coverage_lines(self.backend, self.coverage)]
        lines += ["", "holds for: " + ("; ".join(self.guards) or "every input of these dtypes and ranks")]
        return "\n".join(lines) + "\n"


def _values(title: str, rows: tuple[SavedRow, ...]) -> list[str]:
    stored = [row for row in rows if row.nbytes]
    lines = [f"{title}: {sum(row.nbytes for row in stored):,} bytes in {len(stored)} tensors"]
    lines += [_row_line(row) for row in sorted(stored, key=lambda r: -r.nbytes)[:20]]
    return lines + ([f"  ... and {len(stored) - 20} more"] if len(stored) > 20 else [])


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
    lives = _lifetimes(part)
    rows = [_row(one.node, one.nbytes, names, lives, carried=one.carried) for one in part.saved]
    held = [_row(one.node, one.nbytes, names, lives, handed=one.saved < 0) for one in part.held]
    asked = Taken(backend)
    coverage = [
        CoverageRow(
            names[n],
            operator_name(n),
            info(n).module,
            part.stages.get(n, ""),
            taken.backend,
            taken.kernel,
            taken.reason,
        )
        for n in part.graph.nodes
        if n.op == "call_function" and (taken := part.coverage.get(n, asked))
    ]
    return Report(
        rule,
        backend,
        tuple(program.history),
        tuple(rows),
        certify(part),
        tuple(coverage),
        tuple(program.guard_text),
        (*program.operator.log.entries, *part.graph.log.entries[len(program.operator.log.entries) :]),
        tuple(held),
        tuple(part.graph.treatments),
        max(forward_curve(part).peak, backward_curve(part).peak),
    )


def _lifetimes(part: Partition) -> Lifetimes:
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


def _row(
    node: fx.Node, nbytes: int, names: Names, lives: Lifetimes, *, carried: bool = False, handed: bool = False
) -> SavedRow:
    own = info(node)
    is_input = node.op == "placeholder"
    born, dies = lives
    shown = own.encodes or node
    return SavedRow(
        names[shown],
        own.module,
        own.block,
        str(own.spec) if is_input else operator_name(_operator(shown)),
        names.type(value(node)),
        nbytes,
        "cotangent" if handed and nbytes else _kind(is_input, carried, nbytes),
        born.get(node, 0),
        dies.get(base_of(node), 0),
        own.codec,
    )


def _coverage_lines(backend: str, coverage: Sequence[CoverageRow]) -> list[str]:
    """How many nodes each backend runs, with which kernels; why the others are not run by the one asked for."""
    counts = Counter(row.backend for row in coverage)
    lines = ["run by: " + ", ".join(f"{name} {count} nodes" for name, count in counts.most_common())]
    kernels = Counter(row.kernel for row in coverage if row.backend == backend and row.kernel)
    lines += [f"  {count:>5} by the kernel {name}" for name, count in kernels.most_common()]
    reasons = Counter(row.reason for row in coverage if row.reason)
    return lines + [f"  {count:>5} not by {backend}: {reason}" for reason, count in reasons.most_common()]


def _operator(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else None
    return source if operator_name(node) == "getitem" and isinstance(source, fx.Node) else node


def _kind(is_input: bool, carried: bool, nbytes: int) -> str:
    if is_input:
        return "input"
    if carried:
        return "gradient"
    return "activation" if nbytes else "size"
