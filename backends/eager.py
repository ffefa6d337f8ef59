"""The eager backend: each stage runs as the Python that fx writes for it, one ATen call after the other."""

from __future__ import annotations

from graphrewrite.backends import Run

from graphrewrite._compat import boxed
from graphrewrite.graph.partition import Partition


def lower(part: Partition) -> tuple[Run, ...]:
    """Every stage as a callable. Values are freed after their last use."""
    return tuple(boxed(module) for module in part.modules)
