"""Backends: what runs the stages of a partition. Installed as `graphrewrite.backends`.

A backend is a function `lower(partition) -> (forward, backward)`. Both take their inputs as one list, which they empty,
so that a value can be freed after its last use, and return a sequence of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Run = Callable[[list[Any]], Sequence[Any]]

REGISTRY = {
    "eager": "graphrewrite.backends.eager:lower",
    "inductor": "graphrewrite.backends.inductor:lower",
}
