"""Passes and the pipeline that runs them.

The contract of a pass: `requires(graph)` -> `run(graph) -> PassResult` -> `ensures(graph)`. A pass is a frozen
dataclass whose fields are its options. Between passes one callback sees everything: it verifies, times, snapshots,
prints and dumps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphrewrite import textform
from graphrewrite.errors import VerifyError

if TYPE_CHECKING:
    from torch import fx

    from graphrewrite.graph.joint import JointGraph

PassLevel = Literal["operator", "aten"]


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the graph (the same object or another) and whether anything changed."""

    graph: JointGraph
    modified: bool


@dataclass(frozen=True)
class Pass:
    """A rewrite of the joint graph.

    Class attributes:
        name: Registry name, snake_case.
        level: `"operator"` (after the rule) or `"aten"` (after expansion).
        preserves_numerics: Whether all results stay bitwise the same; checked on request (`verify="numeric"`).
        before_rules: Whether a pass at the operator level runs before the rules: they find its derivatives in place.
        summary: One line for listings.
        paper: Where the method is from.
    """

    name: ClassVar[str] = ""
    level: ClassVar[PassLevel] = "operator"
    preserves_numerics: ClassVar[bool] = False
    before_rules: ClassVar[bool] = False
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def requires(self, graph: JointGraph) -> None:
        """Raise `RuleError` if the pass is not defined on this graph."""

    def run(self, graph: JointGraph) -> PassResult:
        """Rewrite the graph."""
        raise NotImplementedError(f"{type(self).__name__} defines no run()")

    def ensures(self, graph: JointGraph) -> None:
        """Raise `VerifyError` if the pass did not reach what it promises."""

    def fail(self, graph: JointGraph, reason: str, node: fx.Node | None = None) -> None:
        """Note why the pass did not fire on a candidate; shown by `graphrewrite explain`."""
        graph.log.add(self.name, node.name if node is not None else "", reason)

    def __str__(self) -> str:
        return textform.to_text(self)


@dataclass(frozen=True)
class PassEvent:
    """What the between-pass callback sees.

    Attributes:
        ran: The pass.
        index: Its place in the pipeline.
        graph: The graph after it.
        before: A copy of the graph before it, if any callback asked for one.
        modified: What the pass said.
        seconds: How long it ran.
    """

    ran: Pass
    index: int
    graph: JointGraph
    before: JointGraph | None
    modified: bool
    seconds: float


Callback = Callable[[PassEvent], None]


@dataclass(frozen=True)
class PassRecord:
    """One line of the history of a compilation."""

    text: str
    level: str
    seconds: float
    modified: bool
    nodes_before: int
    nodes_after: int


@dataclass
class PassManager:
    """Runs passes in order.

    Attributes:
        passes: What to run.
        callbacks: Called after each pass, in order. One that has the attribute `wants_before` set to True gets a
            copy of the graph before the pass.
        history: What ran, in order.
    """

    passes: Sequence[Pass]
    callbacks: Sequence[Callback] = ()
    history: list[PassRecord] = field(default_factory=list)

    def run(self, graph: JointGraph) -> JointGraph:
        """Run all passes; errors name the pass and those before it."""
        wants_before = any(getattr(callback, "wants_before", False) for callback in self.callbacks)
        for index, one in enumerate(self.passes):
            before = graph.copy() if wants_before else None
            count = len(graph.graph.nodes)
            started = time.perf_counter()
            graph.current_pass = one.name or type(one).__name__
            try:
                one.requires(graph)
                result = one.run(graph)
                one.ensures(result.graph)
            except Exception as error:
                error.add_note(self._where(one))
                raise
            seconds = time.perf_counter() - started
            graph = result.graph
            self.history.append(
                PassRecord(str(one), graph.level, seconds, result.modified, count, len(graph.graph.nodes))
            )
            event = PassEvent(one, index, graph, before, result.modified, seconds)
            for callback in self.callbacks:
                self._call(callback, event)
        return graph

    def _call(self, callback: Callback, event: PassEvent) -> None:
        try:
            callback(event)
        except VerifyError as error:
            raise VerifyError(
                f"pass {event.ran} broke the graph: {error.message}",
                node=error.node,
                module=error.module,
                source=error.source,
                remedy=error.remedy or self._where(event.ran),
            ) from error

    def _where(self, one: Pass) -> str:
        earlier = ", ".join(record.text for record in self.history) or "none"
        return f"in pass {one}; passes before it: {earlier}"

    def __str__(self) -> str:
        return ",".join(str(one) for one in self.passes)


def parse_pipeline(text: str) -> list[Pass]:
    """`"fold_views,eliminate_dead_code{...}"` -> passes. Commas inside braces and strings do not separate."""
    return [build_pass(part) for part in textform.split_commas(text)]


def build_pass(what: Any) -> Pass:
    """A pass from its name, text form, class or object."""
    built: Pass = textform.build("pass", what)
    return built
