"""Folding a printed graph: what lies in modules deeper than a depth becomes one line per module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphrewrite.graph.nodes import nbytes, value
from graphrewrite.graph.text import Line, count_operators

LARGE = 2000
"""A graph of more lines than this is folded if nobody said how deep to look."""

AIM = 600
"""About how many lines are left of it."""


@dataclass(frozen=True)
class Fold:
    """Operators of one module, and of what is below it, told in one line.

    Attributes:
        path: The module, or what the inputs folded belong to.
        lines: The operators.
    """

    path: str
    lines: tuple[Line, ...]

    @property
    def section(self) -> str:
        """Where they stand in the listing."""
        return self.lines[0].section

    @property
    def block(self) -> str:
        """Their block."""
        return self.lines[0].block

    @property
    def nbytes(self) -> int:
        """Bytes of all their results."""
        return sum(nbytes(value(line.node)) for line in self.lines)

    def about(self, most: int = 6) -> str:
        """What is in it, in words: `23 operators: view x6, linear x2, ...`."""
        if self.section == "inputs":
            return f"{len(self.lines)} inputs"
        counts = count_operators(line.node for line in self.lines)
        told = [f"{name} x{n}" if n > 1 else name for name, n in list(counts.items())[:most]]
        total = sum(counts.values())
        rest = ", ..." if len(counts) > most else ""
        return f"{total} operator{'s' if total != 1 else ''}: {', '.join(told)}{rest}"


def fold(lines: Sequence[Line], depth: int | None) -> list[Line | Fold]:
    """Lines in order; those in modules deeper than `depth` are told once per section, block, role and module.

    Args:
        lines: Printed lines.
        depth: How many steps of a module path are looked into; None: all.
    """
    if depth is None:
        return list(lines)
    groups: dict[tuple[str, ...], list[Line]] = {}
    for i, line in enumerate(lines):
        steps = _module(line).split(".") if _module(line) else []
        deep = len(steps) > depth
        key = (line.section, line.block, ".".join(steps[:depth])) if deep else (str(i),)
        groups.setdefault(key, []).append(line)
    return [Fold(key[2], tuple(held)) if len(key) > 1 else held[0] for key, held in groups.items()]


def default_depth(lines: Sequence[Line]) -> int | None:
    """None for a graph that can be read as it is; for a large one, the greatest depth that leaves about `AIM` lines."""
    if len(lines) <= LARGE:
        return None
    deepest = max(_module(line).count(".") + 1 for line in lines)
    fitting = (depth for depth in range(deepest, 0, -1) if len(fold(lines, depth)) <= AIM)
    return next(fitting, 0)


def _module(line: Line) -> str:
    """The module that a line belongs to; for a parameter, the one that holds it."""
    if line.section != "inputs":
        return line.module
    kind, _, name = line.expression.partition(" ")
    return name.rpartition(".")[0] if kind in ("parameter", "buffer") else ""
