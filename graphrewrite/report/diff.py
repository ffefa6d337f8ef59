"""What one rule does to a graph that another does not: two operator-level graphs of one model, compared node by node.

Nodes correspond by identity, never by text:

* an operator of the user's model to itself: capture is deterministic, so it has the same node name in every capture of
  the model, and a copy in another forward pass is that operator in that pass;
* a VJP node to the VJP node of the same part that mirrors the same operator;
* a sum of cotangents to the sum at the same value;
* what a rule made to what the other rule made in the same place: pass, role, block and operator, in order.

A node in one graph only was removed or added. One in both whose inputs are not the same was rerouted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphrewrite.analysis.cost import count
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import BACKWARD_ROLES, LOSS_BLOCK, Role, info, is_getitem, spec_of
from graphrewrite.graph.ops import VjpCall, is_vjp
from graphrewrite.graph.text import Line, Names, lines, operator_name
from graphrewrite.runtime.module import CompiledModule

Identity = tuple[Any, ...]


@dataclass(frozen=True)
class Change:
    """One node that differs.

    Attributes:
        kind: `"removed"`, `"added"` or `"rerouted"`.
        line: The node as printed in the graph that has it; in the new one, if both do.
        copy: The forward pass it belongs to.
        passes: For removed nodes: the forward passes that have the operator, or its derivative, instead.
        was: For rerouted nodes: the inputs that only the old node reads.
        now: For rerouted nodes: the inputs that only the new node reads.
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


@dataclass
class BlockDiff:
    """What changed in one block; pairs are (old, new).

    Attributes:
        block: Its name; `"loss"` is the task loss, `""` what belongs to no block (updates of rule state).
        rules: The rules that train it.
        changes: What differs: removed, rerouted, added.
        kept: How many operators are the same.
        flops: Floating-point operations per step.
        saved_bytes: Bytes saved between forward and backward.
    """

    block: str
    rules: tuple[str, str]
    changes: list[Change] = field(default_factory=list)
    kept: int = 0
    flops: tuple[int, int] = (0, 0)
    saved_bytes: tuple[int, int] = (0, 0)

    def of_kind(self, kind: str) -> list[Change]:
        """The changes of one kind."""
        return [change for change in self.changes if change.kind == kind]


@dataclass(frozen=True)
class Diff:
    """All blocks, in topological order, then the loss, then what belongs to no block."""

    rules: tuple[str, str]
    blocks: list[BlockDiff]

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
    before, after = old.graph("operator"), new.graph("operator")
    reports = old.report(), new.report()
    costs = [count(compiled.graph("aten")).by_block for compiled in (old, new)]
    saved = [report.certificates.saved_bytes for report in reports]
    changes, kept = compare_graphs(before, after)
    rules = [{b.name: b.rule for b in graph.blocks} for graph in (before, after)]
    names = dict.fromkeys([*rules[0], *rules[1], LOSS_BLOCK, ""])
    blocks = [
        BlockDiff(
            name,
            (rules[0].get(name, ""), rules[1].get(name, "")),
            changes.get(name, []),
            kept.get(name, 0),
            (costs[0].get(name, 0), costs[1].get(name, 0)),
            (saved[0].get(name, 0), saved[1].get(name, 0)),
        )
        for name in names
    ]
    return Diff((reports[0].rule, reports[1].rule), [b for b in blocks if b.block or b.changes or b.kept])


def compare_graphs(before: JointGraph, after: JointGraph) -> tuple[dict[str, list[Change]], dict[str, int]]:
    """Block -> its changes, and block -> how many operators are the same."""
    captured = {n.name for graph in (before, after) for n in graph.nodes if _is_users(n)}
    old, new = _identities(before, captured), _identities(after, captured)
    old_names, new_names = Names(before), Names(after)
    old_lines = {line.node: line for line in lines(before, old_names)}
    new_lines = {line.node: line for line in lines(after, new_names)}
    by_identity = {identity: node for node, identity in old.items()}
    changes: dict[str, list[Change]] = {}
    kept: dict[str, int] = {}

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
        if old_ids == new_ids:
            kept[info(node).block] = kept.get(info(node).block, 0) + 1
            continue
        gone = tuple(_shown_as(n, old_names) for one, n in was if one not in new_ids)
        come = tuple(_shown_as(n, new_names) for one, n in now if one not in old_ids)
        note(Change("rerouted", new_lines[node], info(node).copy, was=gone, now=come))
    for change in added:
        note(change)
    return changes, kept


def to_json(diff: Diff) -> dict[str, Any]:
    """The diff as plain data: rules, totals, and for each block its changes, FLOPs and saved bytes as [old, new]."""
    return {
        "rules": list(diff.rules),
        "removed": diff.total("removed"),
        "added": diff.total("added"),
        "rerouted": diff.total("rerouted"),
        "flops": list(diff.flops),
        "saved_bytes": list(diff.saved_bytes),
        "blocks": [
            {
                "name": block.block,
                "rules": list(block.rules),
                "kept": block.kept,
                "flops": list(block.flops),
                "saved_bytes": list(block.saved_bytes),
                **{kind: [_change(c) for c in block.of_kind(kind)] for kind in ("removed", "added", "rerouted")},
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
    if change.kind == "rerouted":
        data.update(was=list(change.was), now=list(change.now))
    return data


# --- identity ------------------------------------------------------------------------------------------------------


def _is_users(node: fx.Node) -> bool:
    """Whether a node is an operator of the user's model or loss, in its first forward pass."""
    own = info(node) if node.op == "call_function" else None
    return own is not None and own.made_by == "capture" and not own.copy and own.role in (Role.FORWARD, Role.LOSS)


def _shown(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_getitem(node)


def _identities(graph: JointGraph, captured: set[str]) -> dict[fx.Node, Identity]:
    """Every node's identity; unique within the graph."""
    found: dict[fx.Node, Identity] = {}
    count: dict[Identity, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        identity = _identity(node, found, captured)
        number = count[identity] = count.get(identity, -1) + 1
        found[node] = (*identity, number)
    return found


def _identity(node: fx.Node, known: dict[fx.Node, Identity], captured: set[str]) -> Identity:
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
