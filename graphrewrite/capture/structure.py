"""Taking a model's outputs apart into tensors, and putting them together again around other tensors.

Beyond torch's registered pytrees this walks into ordinary objects (a `transformers` cache, a user's result class), so
that a model need not change what it returns in order to be captured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphrewrite.errors import CaptureError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type)


@dataclass(frozen=True)
class _Slot:
    """The place of tensor number `index`."""

    index: int


@dataclass(frozen=True)
class _Object:
    """An ordinary object, by its class and the structure of its attributes."""

    prototype: Any
    state: Structure


@dataclass(frozen=True)
class Structure:
    """What an output looks like without its tensors."""

    spec: Any
    leaves: tuple[Any, ...]

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """The output around these tensors."""
        return pytree.tree_unflatten([self._leaf(leaf, tensors) for leaf in self.leaves], self.spec)

    @staticmethod
    def _leaf(leaf: Any, tensors: Sequence[Any]) -> Any:
        if isinstance(leaf, _Slot):
            return tensors[leaf.index]
        if isinstance(leaf, _Object):
            new = copy.copy(leaf.prototype)
            new.__dict__.update(leaf.state.rebuild(tensors))
            return new
        return leaf

    def slots(self) -> Iterator[int]:
        """Indices of the tensors, in order of appearance."""
        for leaf in self.leaves:
            if isinstance(leaf, _Slot):
                yield leaf.index
            elif isinstance(leaf, _Object):
                yield from leaf.state.slots()


def take_apart(outputs: Any) -> tuple[list[Any], Structure]:
    """The tensors of an output (each once) and its structure."""
    tensors: list[Any] = []
    index: dict[int, int] = {}
    structure = _walk(outputs, tensors, index, ())
    return tensors, structure


def _walk(outputs: Any, tensors: list[Any], index: dict[int, int], parents: tuple[int, ...]) -> Structure:
    leaves, spec = pytree.tree_flatten(outputs)
    return Structure(spec, tuple(_leaf(leaf, tensors, index, parents) for leaf in leaves))


def _leaf(leaf: Any, tensors: list[Any], index: dict[int, int], parents: tuple[int, ...]) -> Any:
    if isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat)):
        if id(leaf) not in index:
            index[id(leaf)] = len(tensors)
            tensors.append(leaf)
        return _Slot(index[id(leaf)])
    if isinstance(leaf, _PLAIN) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return leaf
    if isinstance(leaf, nn.Module) or id(leaf) in parents:
        raise CaptureError(
            f"the model returns a {type(leaf).__name__} that cannot be taken apart into tensors",
            remedy="return tensors, containers of them, or plain objects that hold them",
        )
    state = _walk(dict(vars(leaf)), tensors, index, (*parents, id(leaf)))
    return _Object(_without_tensors(leaf), state)


def _without_tensors(held: Any) -> Any:
    """A shallow copy that does not keep the example's tensors alive."""
    prototype = copy.copy(held)
    prototype.__dict__.clear()
    return prototype
