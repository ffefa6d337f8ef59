"""How a saved tensor is stored between the forward and the backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import fx

if TYPE_CHECKING:
    from graphrewrite.analysis.demands import SavedValue

Draw = Callable[[Sequence[Any]], torch.Tensor]
"""Uniform numbers on [0, 1) of a given shape, float32; in a graph they come from the counter-based generator."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@runtime_checkable
class Codec(Protocol):
    """Encodes a saved tensor. Both functions are ordinary PyTorch code, traced into the graph.

    This is all that the verb `encode_saved` needs. `SavedCodec` adds what choosing among codecs needs.
    """

    def encode(self, tensor: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor]:
        """What is stored in the place of `tensor`."""

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape and dtype of `like`."""


@dataclass(frozen=True)
class Declined:
    """Why a codec does not take a value."""

    reason: str


@dataclass(frozen=True)
class SavedCodec(ABC):
    """A codec that says what it costs, how wrong it is, and which saved values it takes.

    The fields select values; a codec's own options come in front of them.

    Args:
        only: Globs of module paths (`"*.mlp"`); a value computed by another module, or outside of it, is not taken.
        skip: Globs of module paths that are not taken.
        operators: Names of operators (`"gelu"`, `"addmm"`): what computed the value, or what reads it in the backward.
        min_bytes: Values smaller than this are not taken.

    Class attributes:
        name: Registry name, snake_case.
        summary: One line for listings.
        paper: Where the method is from.
        error: The error model in one line; `bound` computes it.
        exact: Whether the gradients stay bitwise the same.
        dtypes: What it stores.
        positional: Whether dimensions mean something to it; else it gets the elements in the order of the memory.
        on_host: Whether it stores in the memory of the CPU what lies on a device.
        passes: How often encoding and decoding together move the value, operator by operator; for predictions of time.
        how: `"encode"`: `encode` and `decode` are spliced in; `"recompute"`: the value is computed again;
            `"keep"`: it stays as it is.
    """

    only: tuple[str, ...] = field(default=(), kw_only=True)
    skip: tuple[str, ...] = field(default=(), kw_only=True)
    operators: tuple[str, ...] = field(default=(), kw_only=True)
    min_bytes: int = field(default=0, kw_only=True)

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    error: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    positional: ClassVar[bool] = False
    on_host: ClassVar[bool] = False
    passes: ClassVar[float] = 16.0
    how: ClassVar[Literal["encode", "recompute", "keep"]] = "encode"

    @abstractmethod
    def encode(self, tensor: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor]:
        """What is stored in the place of `tensor`; with `random`, takes `draw=` as well."""

    @abstractmethod
    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape and dtype of `like`."""

    @property
    def random(self) -> bool:
        """Whether `encode` takes `draw=`, a source of uniform numbers."""
        return False

    @property
    def sizes(self) -> tuple[tuple[fx.Node, int], ...]:
        """Sizes of other values, as (value, dimension), that `encode` and `decode` get behind their own arguments."""
        return ()

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """Bits per element of a big tensor of this dtype."""
        return float(8 * dtype.itemsize)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The error model: a bound on |decode(encode(x)) - x| for finite x.

        Returns:
            Of the shape of `tensor`: one bound for each element; a scalar: a bound on the norm of the whole; None: the
            error has no bound.
        """
        return torch.zeros_like(tensor) if self.exact else None

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """The codec for one saved value: this one, one made for the value, or why there is none."""
        if saved.dtype not in self.dtypes:
            return Declined(f"{self.name} does not store {str(saved.dtype).removeprefix('torch.')}")
        if not self.exact and saved.needed_exactly:
            return Declined(f"{saved.needed_exactly} needs it exactly")
        return self

    def selects(self, saved: SavedValue) -> str:
        """Why the fields of the codec leave a value out; "" if they select it."""
        if self.only and not any(inside(saved.module, glob) for glob in self.only):
            return f"module {saved.module or '(root)'} is not among only={list(self.only)}"
        if any(inside(saved.module, glob) for glob in self.skip):
            return f"module {saved.module or '(root)'} is among skip={list(self.skip)}"
        if self.operators and not saved.operators & set(self.operators):
            return f"none of its operators {sorted(saved.operators)} is among {list(self.operators)}"
        if saved.nbytes < self.min_bytes:
            return f"{saved.nbytes:,} bytes are less than min_bytes={self.min_bytes:,}"
        return ""


@dataclass(frozen=True)
class Treatment:
    """What became of one value that the backward reads.

    Attributes:
        name: The value.
        module: Module path that computed it.
        block: Its block.
        operator: What computed it.
        type: dtype and shape.
        before: Bytes at the example's sizes, untreated.
        after: Bytes that are saved in its place.
        codec: Text form of the codec; `"keep"` where it stays as it is.
        why: Why it got this treatment.
        error: Predicted relative error of the gradient that the treatment brings; None where nothing was measured.
    """

    name: str
    module: str
    block: str
    operator: str
    type: str
    before: int
    after: int
    codec: str
    why: str
    error: float | None = None


def inside(module: str, glob: str) -> bool:
    """A glob matches a module by its path, or by that of a module around it; `*` crosses dots."""
    return fnmatchcase(module, glob) or module.startswith(glob + ".")
