"""Looking on while a model is compiled: every stage and every pass, without an option of `compile`.

An observer is made active around a block of code, and sees every program that is built inside it:

>>> with observing(MyObserver()):                         # doctest: +SKIP
...     gr.compile(model, "dfa", example_inputs=x, example_targets=y)

The environment variable `GRAPHREWRITE_DUMP=DIR` makes one active for the whole process: it writes every intermediate
graph of every program into the folder, as `graphrewrite dump` does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphrewrite.graph.joint import JointGraph
    from graphrewrite.pipeline import PassEvent
    from graphrewrite.runtime.program import Program

DUMP_VARIABLE = "GRAPHREWRITE_DUMP"


class Observer:
    """Sees a compilation as it goes on; a subclass overrides what it wants to know. It must not edit a graph.

    Attributes:
        wants_before: Whether `passed` gets a copy of the graph before the pass.
    """

    wants_before = False

    def begin(self, kind: str) -> None:
        """A program is about to be built; `kind` is `"forward"`, `"loss"`, `"evaluate"` or `"predict"`."""

    def stage(self, name: str, graph: JointGraph) -> None:
        """A stage that is no pass is over: `"capture"`, `"differentiate"`, `"expand"`."""

    def passed(self, event: PassEvent) -> None:
        """A pass has run, and the graph was verified."""

    def finish(self, program: Program) -> None:
        """The program is complete."""

    def __call__(self, event: PassEvent) -> None:
        """An observer is a between-pass callback."""
        self.passed(event)


_ACTIVE: ContextVar[tuple[Observer, ...]] = ContextVar("graphrewrite_observers", default=())


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[Observer]:
    """Let an observer see every program that is built inside."""
    token = _ACTIVE.set((*_ACTIVE.get(), observer))
    try:
        yield observer
    finally:
        _ACTIVE.reset(token)


def active() -> tuple[Observer, ...]:
    """The observers of a program that is about to be built."""
    folder = os.environ.get(DUMP_VARIABLE)
    if not folder:
        return _ACTIVE.get()
    from graphrewrite.report.dump import Dumper

    return (*_ACTIVE.get(), Dumper(folder))
