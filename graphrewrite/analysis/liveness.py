"""Bytes that are alive: predicted from a partition, and measured on a running step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphrewrite.graph.aliasing import base_of
from graphrewrite.graph.loop import OPERATOR, run_loop
from graphrewrite.graph.ordering import live_bytes
from graphrewrite.graph.partition import Partition


@dataclass(frozen=True)
class Curve:
    """Live bytes after each node of a stage, values handed in from outside not counted.

    Attributes:
        nodes: The nodes in execution order.
        live: Bytes alive right after each of them was computed, before anything is freed.
    """

    nodes: list[fx.Node]
    live: list[int]

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return max(self.live, default=0)


def forward_curve(part: Partition) -> Curve:
    """Predicted live bytes of the forward stage; saved values and results stay to the end."""
    outputs = part.graph.outputs
    kept = {base_of(s.node) for s in part.saved} | {base_of(outputs[spec]) for spec in part.forward_outputs}
    return Curve(part.order["forward"], live_bytes(part.order["forward"], kept))


def backward_curve(part: Partition) -> Curve:
    """Predicted live bytes of the backward stage, which starts with the saved values."""
    outputs = part.graph.outputs
    kept = {base_of(outputs[spec]) for spec in part.backward_outputs} | {base_of(h.node) for h in part.held}
    order = part.order["backward"]
    return Curve(order, live_bytes(order, kept, [s.node for s in part.saved]))


def weight_curve(part: Partition) -> Curve:
    """Predicted live bytes of the weight stage of a split backward, which starts with the held values."""
    outputs = part.graph.outputs
    kept = {base_of(outputs[spec]) for spec in part.backward_weight_outputs}
    order = part.order.get("weight", [])
    return Curve(order, live_bytes(order, kept, [h.node for h in part.held]))


class LiveBytes(TorchDispatchMode):
    """Measures the bytes of storages that operators allocate while it is active.

    Storages known beforehand (inputs, parameters, buffers) are not counted, nor are views of them.

    >>> with LiveBytes([*model.parameters(), x]) as live:      # doctest: +SKIP
    ...     loss.backward()
    >>> live.peak                                              # doctest: +SKIP

    Attributes:
        current: Bytes alive now.
        peak: The most bytes alive at once so far.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._tracked: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPERATOR:
            with self:  # what a loop allocates in its body counts
                result = run_loop(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf)
        return result

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._tracked:
            return
        size = storage.nbytes()

        def freed(_ref: Any, key: int = key, size: int = size) -> None:
            if self._tracked.pop(key, None) is not None:
                self.current -= size

        self._tracked[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)
