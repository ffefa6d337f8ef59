"""Backends: what runs the stages of a partition. Installed as `graphrewrite.backends`.

A backend is a function `lower(partition)` that returns a callable per stage of `partition.modules`: the forward, the
backward and, where the backward is split in two, its weight stage. Each takes its inputs as one list, which it empties,
so that a value can be freed after its last use, and returns a sequence of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Run = Callable[[list[Any]], Sequence[Any]]

REGISTRY = {
    "eager": "graphrewrite.backends.eager:lower",
    "inductor": "graphrewrite.backends.inductor:lower",
    "triton": "graphrewrite.backends.triton:lower",
}

CODERS = {
    "triton": "graphrewrite.backends.triton.quantise:coder",
}
"""Backend -> a function from a codec to what encodes and decodes in its place, or to the codec itself."""

FUSES = frozenset({"inductor"})
"""Backends that compute neighbouring element-wise operators in one pass over the memory."""

STAND_INS = {
    "triton": "graphrewrite.backends.triton.stand_ins:stand_ins",
}
"""Backend -> a function that gives functions of passes and rules, each with what takes its place: one operator."""


@dataclass(frozen=True)
class Taken:
    """What runs a node of the graph.

    Attributes:
        backend: `"eager"`, `"inductor"`, `"triton"`, ...
        kernel: The kernel that runs it, or that was considered.
        reason: Why not the backend that was asked for; "" if it does.
    """

    backend: str
    kernel: str = ""
    reason: str = ""
