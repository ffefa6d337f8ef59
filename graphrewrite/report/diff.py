"""What one rule does to a graph that another does not, or what a pass did: two graphs of one model, node by node.

Between rules, two operator-level graphs correspond by identity, never by text:

* an operator of the user's model to itself: capture is deterministic, so it has the same node name in every capture of
  the model, and a copy in another forward pass is that operator in that pass;
* a VJP node to the VJP node of the same part that mirrors the same operator;
* a sum of cotangents to the sum at the same value;
* what a rule made to what the other rule made in the same place: pass, role, block and operator, in order.

Before and after a pass, it is one graph that was edited: a node is itself. Its VJP nodes still go by what they mirror,
as a pass may make one of them again.

A node in one graph only was removed or added. One in both whose inputs are not the same was rerouted; one that reads
the same but runs in another stage was moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphrewrite.analysis.cost import count
from graphrewrite.compiler import CLEANUP
from graphrewrite.errors import GraphRewriteError
from graphrewrite.graph.expand import expand
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import BACKWARD_ROLES, LOSS_BLOCK, Role, info, is_getitem, spec_of
from graphrewrite.graph.ops import VjpCall, is_vjp
from graphrewrite.graph.partition import partition
from graphrewrite.graph.text import Line, Names, lines, operator_name
from graphrewrite.observe import Observer
from graphrewrite.pipeline import PassEvent, PassManager, build_pass
from graphrewrite.runtime.module import CompiledModule

Identity = tuple[Any, ...]

KINDS = ("removed", "added", "rerouted", "moved")


@dataclass(frozen=True)
class Change:
    """One node that differs.

    Attributes:
        kind: `"removed"`, `"added"`, `"rerouted"` or `"moved"`.
        line: The node as printed in the graph that has it; in the new one, if both do.
        copy: The forward pass it belongs to.
        passes: For removed nodes: the forward passes that have the operator, or its derivative, instead.
        was: For rerouted nodes: the inputs that only the old node reads; for moved ones: the stage.
        now: For rerouted nodes: the inputs that only the new node reads; for moved ones: the stage.
    """

    kind: str
    line: Line
    copy: str = ""
    passes: tuple[str, ...] = ()
    was: tuple[str, ...] = ()
    now: tuple[str, ...] = ()

    @property
    def backward(self) -> bool:
        """Whether it is part of the backward."""
        return self.line.role in BACKWARD_ROLES


@dataclass(frozen=True)
class Row:
    """One line of a side-by-side view.

    Attributes:
        kind: As in `Change`, or `"kept"`.
        old: The node in the old graph, if it is there.
        new: The node in the new graph, if it is there.
    """

    kind: str
    old: Line | None
    new: Line | None


@dataclass
class BlockDiff:
    """What changed in one block; pairs are (old, new).

    Attributes:
        block: Its name; `"loss"` is the task loss, `""` what belongs to no block (updates of rule state).
        rules: The rules that train it.
        changes: What differs: removed, rerouted, moved, added.
        rows: All operators of both, aligned, in execution order.
        flops: Floating-point operations per step.
        saved_bytes: Bytes saved between forward and backward.
    """

    block: str
    rules: tuple[str, str]
    changes: list[Change] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    flops: tuple[int, int] = (0, 0)
    saved_bytes: tuple[int, int] = (0, 0)

    @property
    def kept(self) -> int:
        """How many operators are the same."""
        return sum(row.kind == "kept" for row in self.rows)

    def of_kind(self, kind: str) -> list[Change]:
        """The changes of one kind."""
        return [change for change in self.changes if change.kind == kind]


@dataclass(frozen=True)
class Diff:
    """All blocks, in topological order, then the loss, then what belongs to no block.

    Attributes:
        rules: The rules compared; before and after a pass, the rule in use, twice.
        blocks: What changed in each.
        ran: The pass in between, "" between rules.
    """

    rules: tuple[str, str]
    blocks: list[BlockDiff]
    ran: str = ""

    @property
    def sides(self) -> tuple[str, str]:
        """What the two graphs are called."""
        return (f"before {self.ran}", f"after {self.ran}") if self.ran else self.rules

    @property
    def flops(self) -> tuple[int, int]:
        """Floating-point operations per step of both."""
        return sum(b.flops[0] for b in self.blocks), sum(b.flops[1] for b in self.blocks)

    @property
    def saved_bytes(self) -> tuple[int, int]:
        """Bytes saved between forward and backward of both."""
        return sum(b.saved_bytes[0] for b in self.blocks), sum(b.saved_bytes[1] for b in self.blocks)

    def total(self, kind: str) -> int:
        """How many changes of a kind there are."""
        return sum(len(b.of_kind(kind)) for b in self.blocks)


def compare_compiled(old: CompiledModule, new: CompiledModule) -> Diff:
    """Compare two compilations of the same model on the same example."""
    graphs = old.graph("operator"), new.graph("operator")
    reports = old.report(), new.report()
    costs = [count(compiled.graph("aten")).by_block for compiled in (old, new)]
    saved = [report.certificates.saved_bytes for report in reports]
    captured = {n.name for graph in graphs for n in graph.nodes if _is_users(n)}
    return Diff((reports[0].rule, reports[1].rule), _blocks(graphs, captured, costs, saved))


def compare_pass(ran: str, rule: str, before: JointGraph, after: JointGraph) -> Diff:
    """Compare the graphs before and after a pass; neither is changed.

    FLOPs and saved bytes are those of the program that would result from each graph without any other optional pass.

    Args:
        ran: The pass.
        rule: The rule in use.
        before: A copy of the graph before it.
        after: The graph after it.
    """
    costs, saved = [], []
    for graph in (before, after):
        part = partition(_settled(graph))
        costs.append(count(part.graph).by_block)
        held: dict[str, int] = {}
        for one in part.saved:
            held[info(one.node).block] = held.get(info(one.node).block, 0) + one.nbytes
        saved.append(held)
    return Diff((rule, rule), _blocks((before, after), None, costs, saved), ran)


def _settled(graph: JointGraph) -> JointGraph:
    """A copy at the ATen level, cleaned up."""
    settled = graph.copy() if graph.level == "aten" else expand(graph)
    return PassManager([build_pass(name) for name in CLEANUP]).run(settled)


def _blocks(
    graphs: tuple[JointGraph, JointGraph],
    captured: set[str] | None,
    costs: Sequence[dict[str, int]],
    saved: Sequence[dict[str, int]],
) -> list[BlockDiff]:
    changes, rows = _compare(*graphs, captured)
    rules = [{b.name: b.rule for b in graph.blocks} for graph in graphs]
    names = dict.fromkeys([*rules[0], *rules[1], LOSS_BLOCK, ""])
    blocks = [
        BlockDiff(
            name,
            (rules[0].get(name, ""), rules[1].get(name, "")),
            changes.get(name, []),
            rows.get(name, []),
            (costs[0].get(name, 0), costs[1].get(name, 0)),
            (saved[0].get(name, 0), saved[1].get(name, 0)),
        )
        for name in names
    ]
    return [b for b in blocks if b.block or b.rows]


def _compare(
    before: JointGraph, after: JointGraph, captured: set[str] | None
) -> tuple[dict[str, list[Change]], dict[str, list[Row]]]:
    """Block -> its changes, and block -> its operators in both graphs, aligned."""
    old, new = _identities(before, captured), _identities(after, captured)
    old_names, new_names = Names(before), Names(after)
    old_lines = {line.node: line for line in lines(before, old_names)}
    new_lines = {line.node: line for line in lines(after, new_names)}
    by_identity = {identity: node for node, identity in old.items()}
    changes: dict[str, list[Change]] = {}
    kinds: dict[Identity, str] = {}

    def note(change: Change) -> None:
        changes.setdefault(change.line.block, []).append(change)

    still_there = set(new.values())
    for node, identity in old.items():
        if _shown(node) and identity not in still_there:
            passes = [label for label in after.passes if _in_pass(identity, label) in still_there]
            note(Change("removed", old_lines[node], info(node).copy, tuple(passes)))
    added = []
    for node, identity in new.items():
        if not _shown(node):
            continue
        match = by_identity.get(identity)
        if match is None:
            added.append(Change("added", new_lines[node], info(node).copy))
            continue
        was = [(_value(n, old), n) for n in _reads(match)]
        now = [(_value(n, new), n) for n in _reads(node)]
        old_ids, new_ids = [one for one, _ in was], [one for one, _ in now]
        stages = info(match).stage or "default", info(node).stage or "default"
        if old_ids != new_ids:
            gone = tuple(_shown_as(n, old_names) for one, n in was if one not in new_ids)
            come = tuple(_shown_as(n, new_names) for one, n in now if one not in old_ids)
            kinds[identity] = "rerouted"
            note(Change("rerouted", new_lines[node], info(node).copy, was=gone, now=come))
        elif stages[0] != stages[1]:
            kinds[identity] = "moved"
            note(Change("moved", new_lines[node], info(node).copy, was=stages[:1], now=stages[1:]))
        else:
            kinds[identity] = "kept"
    for change in added:
        note(change)
    left = {old[node]: line for node, line in old_lines.items() if _shown(node)}
    right = {new[node]: line for node, line in new_lines.items() if _shown(node)}
    return changes, _aligned(left, right, kinds)


def _aligned(
    left: dict[Identity, Line], right: dict[Identity, Line], kinds: dict[Identity, str]
) -> dict[str, list[Row]]:
    """Block -> rows in the order of the new graph, with what was removed behind what it stood behind."""
    behind: dict[Identity | None, list[Identity]] = {}
    latest: dict[str, Identity | None] = {}
    for identity, line in left.items():
        if identity in right:
            latest[line.block] = identity
        else:
            behind.setdefault(latest.get(line.block), []).append(identity)
    rows: dict[str, list[Row]] = {}

    def removed_behind(identity: Identity | None) -> None:
        for gone in behind.get(identity, ()):
            rows.setdefault(left[gone].block, []).append(Row("removed", left[gone], None))

    removed_behind(None)
    for identity, line in right.items():
        kind = kinds.get(identity, "added")
        rows.setdefault(line.block, []).append(Row(kind, left.get(identity), line))
        removed_behind(identity)
    return rows


def to_json(diff: Diff) -> dict[str, Any]:
    """The diff as plain data: rules, totals, and for each block its changes, FLOPs and saved bytes as [old, new]."""
    return {
        "rules": list(diff.rules),
        "pass": diff.ran or None,
        "removed": diff.total("removed"),
        "added": diff.total("added"),
        "rerouted": diff.total("rerouted"),
        "moved": diff.total("moved"),
        "flops": list(diff.flops),
        "saved_bytes": list(diff.saved_bytes),
        "blocks": [
            {
                "name": block.block,
                "rules": list(block.rules),
                "kept": block.kept,
                "flops": list(block.flops),
                "saved_bytes": list(block.saved_bytes),
                **{kind: [_change(c) for c in block.of_kind(kind)] for kind in KINDS},
            }
            for block in diff.blocks
        ],
    }


def _change(change: Change) -> dict[str, Any]:
    line = change.line
    data: dict[str, Any] = {
        "name": line.name.removeprefix("%"),
        "type": line.type,
        "expression": line.expression,
        "role": line.role,
        "module": line.module,
        "copy": change.copy,
        "made_by": info(line.node).made_by,
    }
    if change.kind == "removed":
        data["passes"] = list(change.passes)
    if change.kind in ("rerouted", "moved"):
        data.update(was=list(change.was), now=list(change.now))
    return data


# --- identity ------------------------------------------------------------------------------------------------------


def _is_users(node: fx.Node) -> bool:
    """Whether a node is an operator of the user's model or loss, in its first forward pass."""
    own = info(node) if node.op == "call_function" else None
    return own is not None and own.made_by == "capture" and not own.copy and own.role in (Role.FORWARD, Role.LOSS)


def _shown(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_getitem(node)


def _identities(graph: JointGraph, captured: set[str] | None) -> dict[fx.Node, Identity]:
    """Every node's identity; unique within the graph.

    Args:
        graph: The graph.
        captured: Names of the user's own operators, which two graphs of a model share; None: the graphs compared are
            one graph before and after an edit, and share all names that they both have.
    """
    found: dict[fx.Node, Identity] = {}
    count: dict[Identity, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        identity = _identity(node, found, captured)
        number = count[identity] = count.get(identity, -1) + 1
        found[node] = (*identity, number)
    return found


def _identity(node: fx.Node, known: dict[fx.Node, Identity], captured: set[str] | None) -> Identity:
    if node.op == "placeholder":
        return ("input", str(spec_of(node)))
    if node.op == "get_attr":
        return ("attribute", str(node.target))
    if is_getitem(node):
        return ("item", known[node.args[0]], node.args[1])  # type: ignore[index]
    own = info(node)
    if is_vjp(node):
        return ("w" if own.role is Role.GRADIENT else "d", known[VjpCall.of(node).mirror])
    if own.role is Role.ACCUMULATE and own.cotangent_of is not None and own.cotangent_of in known:
        return ("sum", known[own.cotangent_of])
    if captured is None:
        return ("node", node.name, str(node.target))
    original = node.name.removesuffix(f"_{own.copy}") if own.copy else node.name
    if original in captured and own.role in (Role.FORWARD, Role.LOSS):
        return ("operator", original, own.copy, str(node.target))
    return ("made", own.made_by, str(own.role), own.block, own.copy, operator_name(node))


def _value(node: fx.Node, known: dict[fx.Node, Identity]) -> Identity:
    """The identity of a value. A VJP's results go by the input they belong to: it may return one of them or several."""
    source, index = node, 0
    if is_getitem(node):
        source, index = node.args  # type: ignore[assignment]
    if is_vjp(source):
        return ("result", known[source], VjpCall.of(source).wrt[index])
    return known[node]


def _in_pass(identity: Identity, label: str) -> Identity:
    """The identity that an operator, or what mirrors it, has in another forward pass."""
    if identity[0] == "operator":
        return ("operator", identity[1], label, *identity[3:])
    return tuple(_in_pass(part, label) if isinstance(part, tuple) else part for part in identity)


def _reads(node: fx.Node) -> list[fx.Node]:
    """What a node reads, in order; a VJP node reads its cotangents and what stands in for its primals."""
    if not is_vjp(node):
        return list(node.all_input_nodes)
    call = VjpCall.of(node)
    return [*(c for c in call.cotangents if c is not None), *call.replaced.values()]


def _shown_as(node: fx.Node, names: Names) -> str:
    role = info(node).role
    return f"%{names[node]}" + (f" ({role})" if role is Role.SIGNAL else "")


def grouped(changes: Iterable[Change]) -> dict[tuple[str, str], list[Change]]:
    """(role, forward pass) -> changes: for printing many of them in one line."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        groups.setdefault((change.line.role, change.copy), []).append(change)
    return groups


# --- before and after passes -----------------------------------------------------------------------------------------


class Snapshots(Observer):
    """Keeps the graphs before and after each pass of the program built last.

    Attributes:
        taken: For each pass that ran, in order: its text form, its registry name, and the graphs before and after it.
    """

    wants_before = True

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, JointGraph, JointGraph]] = []

    def begin(self, kind: str) -> None:
        """Forget the program before."""
        self.taken.clear()

    def passed(self, event: PassEvent) -> None:
        """Keep a copy: later passes go on editing the graph."""
        assert event.before is not None
        name = event.ran.name or type(event.ran).__name__
        self.taken.append((str(event.ran), name, event.before, event.graph.copy()))

    def find(self, name: str) -> tuple[str, JointGraph, JointGraph]:
        """The text form of a pass and the graphs before and after it; `NAME:2` is the second time that it ran.

        Raises:
            GraphRewriteError: No such pass ran.
        """
        wanted, _, number = name.replace("-", "_").partition(":")
        found = [(text, before, after) for text, one, before, after in self.taken if wanted in (one, text)]
        which = int(number) if number.isdigit() else 1 if not number else 0
        if not 1 <= which <= len(found):
            ran = ", ".join(dict.fromkeys(one for _, one, _, _ in self.taken)) or "none"
            times = f"; {wanted} ran {len(found)} times" if found else ""
            raise GraphRewriteError(f"no pass {name!r} ran on this model{times}", remedy=f"passes that ran: {ran}")
        return found[which - 1]
