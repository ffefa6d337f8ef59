"""Why each pass did, or did not, fire on each candidate.

What a pass did is read off the graphs before and after it; why it declined a candidate is what the pass itself noted
with `Pass.fail(graph, reason, node)`. For a rule the candidates are its blocks: each is told, with what changed in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphrewrite.graph.codec import Treatment
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import Role, info, is_backward, is_getitem
from graphrewrite.graph.ops import is_vjp
from graphrewrite.graph.text import Names, operator_name
from graphrewrite.observe import Observer
from graphrewrite.pipeline import PassEvent
from graphrewrite.rule import Rule


@dataclass(frozen=True)
class Firing:
    """One node that a pass changed.

    Attributes:
        kind: `"removed"`, `"replaced"` (by an existing node), `"added"`, `"rerouted"`, `"moved"` (to another
            stage) or `"stored"` (a saved value that is kept in another form).
        node: Its printed name.
        operator: What it computes.
        role: What it is for.
        block: Its block.
        module: The user's module that it belongs to.
        source: `file:line` of the user's code.
        text: What happened, in words.
    """

    kind: str
    node: str
    operator: str
    role: str
    block: str
    module: str
    source: str
    text: str


@dataclass(frozen=True)
class Refusal:
    """One candidate that a pass declined; `node` is "" for a reason that concerns the whole graph or a block."""

    node: str
    block: str
    module: str
    source: str
    reason: str


@dataclass(frozen=True)
class Story:
    """What one pass did.

    Attributes:
        text: The pass's text form.
        name: Its registry name.
        summary: What it is for.
        level: The level of the graph that it ran on.
        modified: Whether it says that it changed something.
        seconds: How long it ran.
        nodes: How many nodes there were before and after it.
        fired: What it changed.
        declined: What it declined, with the reason.
    """

    text: str
    name: str
    summary: str
    level: str
    modified: bool
    seconds: float
    nodes: tuple[int, int]
    fired: tuple[Firing, ...]
    declined: tuple[Refusal, ...]


class Explainer(Observer):
    """Collects the stories of all passes of the program built last."""

    wants_before = True

    def __init__(self) -> None:
        self.stories: list[Story] = []
        self._told = 0

    def begin(self, kind: str) -> None:
        """Forget the program before."""
        self.stories.clear()
        self._told = 0

    def stage(self, name: str, graph: JointGraph) -> None:
        """What was noted before the first pass belongs to none."""
        if name == "capture":
            self._told = len(graph.log.entries)

    def passed(self, event: PassEvent) -> None:
        """Read off what the pass did."""
        before, after = event.before, event.graph
        assert before is not None
        names = Names(before), Names(after)
        entries = after.log.entries[self._told :]
        self._told += len(entries)
        treated = [] if after.treatments == before.treatments else after.treatments
        fired = tuple(_stored(treated) if treated else _changes(before, after, *names))
        declined = [_refusal(node, reason, ((before, names[0]), (after, names[1]))) for _, node, reason in entries]
        told = {one.node for one in declined}
        declined += [
            Refusal(one.name, one.block, one.module, "", one.why)
            for one in treated
            if one.codec == "keep" and one.name not in told
        ]
        if isinstance(event.ran, Rule):
            declined += _untouched_blocks(after, fired, declined)
        self.stories.append(
            Story(
                str(event.ran),
                event.ran.name or type(event.ran).__name__,
                event.ran.summary,
                after.level,
                event.modified,
                event.seconds,
                (len(before.graph.nodes), len(after.graph.nodes)),
                fired,
                tuple(declined),
            )
        )


def to_json(stories: Iterable[Story]) -> list[dict[str, Any]]:
    """Stories as plain data, field by field."""
    return [
        {
            "pass": one.text,
            "name": one.name,
            "summary": one.summary,
            "level": one.level,
            "modified": one.modified,
            "seconds": one.seconds,
            "nodes": list(one.nodes),
            "fired": [vars(firing) for firing in one.fired],
            "declined": [vars(refusal) for refusal in one.declined],
        }
        for one in stories
    ]


def _changes(before: JointGraph, after: JointGraph, old: Names, new: Names) -> Iterable[Firing]:
    """Nodes that differ. A pass works on one graph and a copy keeps names, so here a name is a node's identity."""
    was = {node.name: node for node in before.nodes if node.op != "output"}
    now = {node.name: node for node in after.nodes if node.op != "output"}
    again = _made_again(was, now)
    heirs = _heirs(was, now) | {old_name: name for name, old_name in again.items()}
    for name, node in was.items():
        if name in now or is_getitem(node) or name in again.values():
            continue
        heir = heirs.get(name)
        if heir is None:
            yield _firing("removed", node, old, "nothing reads it any more")
        else:
            yield _firing("replaced", node, old, f"its readers read %{new[now[heir]]} instead")
    for name, node in now.items():
        match = was.get(again.get(name, name))
        if match is None:
            if not is_getitem(node):
                reads = ", ".join(f"%{new[s]}" for s in node.all_input_nodes)
                yield _firing("added", node, new, f"reads {reads}" if reads else "")
            continue
        if node.op != "call_function":
            continue
        if match.target is not node.target:
            yield _firing("rerouted", node, new, f"was {operator_name(match)}")
        elif reread := _reread(match, node, heirs, old, new):
            yield _firing("rerouted", node, new, reread)
        if info(match).stage != info(node).stage:
            yield _firing("moved", node, new, f"to the {info(node).stage or 'default'} stage")


def _stored(treated: Iterable[Treatment]) -> Iterable[Firing]:
    """The treatments of saved values: they say more than the operators that carry them out."""
    for one in treated:
        if one.codec != "keep":
            text = f"as {one.codec}, {one.before:,} -> {one.after:,} bytes: {one.why}"
            yield Firing("stored", one.name, one.operator, str(Role.FORWARD), one.block, one.module, "", text)


def _heirs(was: dict[str, fx.Node], now: dict[str, fx.Node]) -> dict[str, str]:
    """Removed nodes -> the node that was there already and that one of their readers reads in their place."""
    heirs: dict[str, str] = {}
    for name, node in was.items():
        if name in now:
            continue
        for user in node.users:
            reader = now.get(user.name)
            if reader is None or len(reader.all_input_nodes) != len(user.all_input_nodes):
                continue
            instead = reader.all_input_nodes[user.all_input_nodes.index(node)]
            if instead.name in was and instead.name not in {s.name for s in user.all_input_nodes}:
                heirs[name] = instead.name
                break
    return heirs


def _made_again(was: dict[str, fx.Node], now: dict[str, fx.Node]) -> dict[str, str]:
    """New VJP nodes -> the removed one that was the same part of the same operator's derivative."""
    gone: dict[tuple[str, str], list[str]] = {}
    for name, node in was.items():
        if name not in now and is_vjp(node):
            gone.setdefault(_part(node), []).append(name)
    return {
        name: gone[_part(node)].pop(0)
        for name, node in now.items()
        if name not in was and is_vjp(node) and gone.get(_part(node))
    }


def _part(node: fx.Node) -> tuple[str, str]:
    mirror = info(node).mirrors
    return (mirror.name if mirror is not None else "", str(info(node).role))


def _reread(match: fx.Node, node: fx.Node, heirs: dict[str, str], old: Names, new: Names) -> str:
    """In words, what a node reads now that it did not read before; "" if that only follows from a replacement."""
    theirs = {heirs.get(s.name, s.name): s for s in match.all_input_nodes}
    mine = {s.name: s for s in node.all_input_nodes}
    gone = [f"%{old[s]}" for name, s in theirs.items() if name not in mine]
    come = [f"%{new[s]}" for name, s in mine.items() if name not in theirs]
    if gone or come:
        return f"reads {', '.join(come) or 'nothing'} instead of {', '.join(gone) or 'nothing'}"
    same = len(theirs) == len(match.all_input_nodes) and _constants(match) != _constants(node)
    return "other constant arguments" if same else ""


def _constants(node: fx.Node) -> str:
    return str(fx.map_arg((node.args, node.kwargs), lambda n: "node"))


def _firing(kind: str, node: fx.Node, names: Names, text: str) -> Firing:
    own = info(node)
    operator = operator_name(node) if node.op == "call_function" else str(own.spec or node.target)
    return Firing(kind, names[node], operator, str(own.role), own.block, own.module, own.source, text)


def _refusal(node: str, reason: str, graphs: tuple[tuple[JointGraph, Names], ...]) -> Refusal:
    known: dict[str, tuple[fx.Node, str]] = {}
    for graph, names in graphs:
        known.update({n.name: (n, names[n]) for n in graph.nodes})
    # passes write node names, readers know the printed ones
    reason = re.sub(r"%(\w+)", lambda m: f"%{known[m[1]][1]}" if m[1] in known else m[0], reason)
    if node not in known:
        return Refusal(node, "", "", "", reason)
    found, shown = known[node]
    own = info(found)
    return Refusal(shown, own.block, own.module, own.source, reason)


def _untouched_blocks(graph: JointGraph, fired: Iterable[Firing], declined: Iterable[Refusal]) -> list[Refusal]:
    """The blocks that a rule trains, but in which it changed nothing and told no reason."""
    touched = {one.block for one in fired} | {one.block for one in declined}
    learning = {info(node).block for node in graph.nodes if is_backward(node)}
    return [
        Refusal("", block.name, block.name, "", "the rule left the exact backward of this block as it is")
        for block in graph.rule_blocks()
        if block.name not in touched and block.name in learning
    ]
