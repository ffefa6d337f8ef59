"""Rewrites by pattern: what to look for, whether it may be rewritten, and what takes its place.

>>> from graphrewrite.patterns import PatternPass, fail, op, var
>>> @dataclass(frozen=True)                                            # doctest: +SKIP
... class FoldDoubleNegation(PatternPass):
...     name = "fold_double_negation"
...     level = "aten"
...     pattern = op(aten.neg.default, op(aten.neg.default, var("x"), name="inner"))
...
...     def check(self, graph, match):
...         if info(match["inner"]).block != info(match.root).block:
...             return fail("the two are in different blocks", match["inner"])
...
...     def rewrite(self, graph, match):
...         return match["x"]

Operators are matched as objects, never by node name. A match that `check` refuses is noted with its reason, and shown
by `graphrewrite explain`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphrewrite.graph.joint import JointGraph
from graphrewrite.pipeline import Pass, PassResult


@dataclass(frozen=True)
class Var:
    """Matches any argument and binds it to a name; the same name twice must be the same argument."""

    name: str


@dataclass(frozen=True)
class Op:
    """Matches a call of one of some operators.

    Attributes:
        targets: The operators.
        args: Patterns or constants for the first arguments; further arguments may be anything.
        name: What the node is bound to, "" for nothing.
        only_reader: Whether nothing but the match may read the node; always allowed for the root.
    """

    targets: frozenset[Any]
    args: tuple[Any, ...] = ()
    name: str = ""
    only_reader: bool = False


@dataclass
class Match:
    """Where a pattern was found.

    Attributes:
        root: The node that the whole pattern matched.
        bound: Names -> nodes or constants.
    """

    root: fx.Node
    bound: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


@dataclass(frozen=True)
class Failure:
    """Why a match is not rewritten."""

    reason: str
    node: fx.Node | None = None


def var(name: str) -> Var:
    """A pattern that matches anything, and binds it."""
    return Var(name)


def op(target: Any, *args: Any, name: str = "", only_reader: bool = False) -> Op:
    """A pattern for a call.

    Args:
        target: An operator, or a collection of them.
        args: Patterns or constants for the first arguments.
        name: What to bind the node to.
        only_reader: Refuse a node that something outside the match reads as well.
    """
    targets = frozenset(target) if isinstance(target, Collection) else frozenset([target])
    return Op(targets, args, name, only_reader)


def fail(reason: str, node: fx.Node | None = None) -> Failure:
    """What `check` returns to decline a match; `node` is the one to blame, the root if not given."""
    return Failure(reason, node)


def match(pattern: Op, node: fx.Node) -> Match | None:
    """Match a pattern at a node."""
    found = Match(node)
    return found if _matches(pattern, node, found) else None


def _matches(pattern: Any, held: Any, found: Match) -> bool:
    if isinstance(pattern, Var):
        known = found.bound.setdefault(pattern.name, held)
        return known is held or (not isinstance(held, fx.Node) and not isinstance(known, fx.Node) and known == held)
    if not isinstance(pattern, Op):
        return not isinstance(held, fx.Node) and type(held) is type(pattern) and bool(held == pattern)
    if not isinstance(held, fx.Node) or held.op != "call_function" or held.target not in pattern.targets:
        return False
    if len(held.args) < len(pattern.args) or (pattern.only_reader and held is not found.root and len(held.users) > 1):
        return False
    if not all(_matches(p, a, found) for p, a in zip(pattern.args, held.args, strict=False)):
        return False
    return not pattern.name or _matches(Var(pattern.name), held, found)


@dataclass(frozen=True)
class PatternPass(Pass):
    """A pass that rewrites every match of a pattern, in execution order.

    Class attributes:
        pattern: What to look for.
    """

    pattern: ClassVar[Op]

    def check(self, graph: JointGraph, match: Match) -> Failure | None:
        """Return `fail(reason)` to leave a match alone."""
        return None

    def rewrite(self, graph: JointGraph, match: Match) -> fx.Node | None:
        """Rewrite a match: return the node that takes the root's place, or None if the root was edited itself.

        New nodes are made by `graph.emit` or `graph.splice`; they are moved in front of what reads them.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no rewrite()")

    def run(self, graph: JointGraph) -> PassResult:
        """Match, check, rewrite."""
        modified = False
        for node in list(graph.nodes):
            found = match(self.pattern, node)
            if found is None:
                continue
            failure = self.check(graph, found)
            if failure is not None:
                self.fail(graph, failure.reason, failure.node or node)
                continue
            instead = self.rewrite(graph, found)
            if instead is not None:
                graph.substitute(node, instead)
            modified = True
        if modified:
            graph.sort()
        return PassResult(graph, modified)
