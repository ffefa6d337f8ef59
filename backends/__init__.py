"""Backends: what runs the stages of a partition. Installed as `graphrewrite.backends`.

A backend is a function `lower(partition)` that returns a callable per stage of `partition.modules`: the forward, the
backward and, where the backward is split in two, its weight stage. Each takes its inputs as one list, which it empties,
so that a value can be freed after its last use, and returns a sequence of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Run = Callable[[list[Any]], Sequence[Any]]

REGISTRY = {
    "eager": "graphrewrite.backends.eager:lower",
    "inductor": "graphrewrite.backends.inductor:lower",
}
