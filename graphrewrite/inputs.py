"""What a user may hand to `loss`, `predict` and friends as model inputs, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphrewrite.errors import GraphRewriteError


class Inputs:
    """Positional and keyword inputs of a model: `model(*args, **kwargs)`.

    Needed only where a plain tensor, tuple or dict would be ambiguous: both positional and keyword inputs, or a
    single input that is itself a tuple or a dict.
    """

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        parts = [type(a).__name__ for a in self.args] + [f"{k}={type(v).__name__}" for k, v in self.kwargs.items()]
        return f"Inputs({', '.join(parts)})"


def as_inputs(x: Any) -> Inputs:
    """Tensor -> `model(x)`; tuple -> `model(*x)`; mapping -> `model(**x)`; `Inputs` -> itself."""
    if isinstance(x, Inputs):
        return x
    if isinstance(x, torch.Tensor):
        return Inputs(x)
    if isinstance(x, tuple):
        return Inputs(*x)
    if isinstance(x, Mapping):
        return Inputs(**x)
    raise GraphRewriteError(
        f"model inputs of type {type(x).__name__} are ambiguous",
        remedy="pass a tensor, a tuple (positional), a dict (keyword) or graphrewrite.Inputs(*args, **kwargs)",
    )


def as_targets(y: Any) -> Any:
    """A one-element tuple means its element; anything else is itself."""
    return y[0] if isinstance(y, tuple) and len(y) == 1 else y
