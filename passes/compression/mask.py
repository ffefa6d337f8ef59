"""One bit where one bit is all that is read: masks of ReLU and dropout, and positions inside pooling windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from graphrewrite.passes.compression._packing import pack, unpack
from torch import fx

from graphrewrite.analysis.demands import Comparison, Demand, SavedValue, is_pool_index
from graphrewrite.graph.codec import FLOATS, Declined, SavedCodec
from graphrewrite.graph.nodes import producer, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask(SavedCodec):
    """Exact: gradients stay bitwise the same.

    * A value that the backward only compares with a constant (the input or output of ReLU, ReLU6, leaky ReLU, hard
      sigmoid) becomes one bit per element: the outcome of the comparison. NaN compares as it does in the operator.
    * A dropout mask, 0 or 1/(1-p), and every boolean tensor become one bit per element.
    * Indices of a max pooling become the position inside the window: ceil(log2(window)) bits instead of 64.
    * A value of which only the shape is read is not stored at all.
    """

    name = "mask"
    summary = "1-bit masks of ReLU and dropout, few-bit pooling indices; exact"
    paper = "ActNN (Chen et al., 2021), Tempo (Andoorveedu et al., 2022)"
    error = "none: gradients are bitwise the same"
    exact = True
    passes = 4.0
    dtypes = (*FLOATS, torch.bool, torch.int64)

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """One; for pooling indices as many as the window needs."""
        return 1.0

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The bits of a boolean tensor; other values need `fit`."""
        return [pack(tensor.to(torch.bool), 1)]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The boolean tensor."""
        return unpack(residuals[0], 1, like.numel()).view(like.shape).to(like.dtype)

    def fit(self, saved: SavedValue) -> SavedCodec | Declined:
        """The kind of mask that suits the value."""
        if saved.dtype == torch.bool:
            return self
        if saved.readings and all(one.demand is Demand.SHAPE for one in saved.readings):
            return ShapeOnly()
        if saved.dtype == torch.int64:
            return _window(saved.node)
        scale = dropout_scale(saved.node)
        if scale is not None:
            return DropoutMask(scale=scale)
        comparisons = {one.comparison for one in saved.readings if one.demand is not Demand.SHAPE}
        if len(comparisons) == 1:
            (comparison,) = comparisons
            if comparison is not None and saved.dtype in FLOATS:
                return SignMask(comparison=comparison)
        if None in comparisons:
            reader = next(one.reader for one in saved.readings if one.comparison is None)
            return Declined(f"{getattr(reader.target, '__name__', reader.name)} reads more than a mask")
        return Declined("its readers compare it with different constants")


@dataclass(frozen=True)
class ShapeOnly(Mask):
    """Nothing is stored: the backward reads the shape only."""

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """None."""
        return 0.0

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Nothing."""
        return []

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """One number, seen in the right shape."""
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


@dataclass(frozen=True)
class SignMask(Mask):
    """The outcome of one comparison; decoded to numbers that compare the same way."""

    comparison: Comparison = field(default=("positive", ()), repr=False)

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """One bit per element, decided by the operator itself: it alone knows how it rounds its limits and sees NaN."""
        kind, limits = self.comparison
        ones = torch.ones_like(tensor)
        if kind == "above":
            passed = aten.threshold_backward(ones, tensor, limits[0])
        elif kind == "positive":
            passed = aten.leaky_relu_backward(ones, tensor, 0.0, False)
        elif kind == "hardsigmoid":
            passed = aten.hardsigmoid_backward(ones, tensor)
        else:
            passed = aten.hardtanh_backward(ones, tensor, *limits)
        held = passed != 0
        return [pack(held, 1)]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Numbers on the two sides of the comparison."""
        held = unpack(residuals[0], 1, like.numel()).view(like.shape)
        kind, limits = self.comparison
        if kind == "above" and limits[0] != 0:
            return torch.where(held > 0, math.inf, -math.inf).to(like.dtype)
        if kind in ("between", "hardsigmoid"):
            return torch.where(held > 0, 0.5 * (limits[0] + limits[1]), math.inf).to(like.dtype)
        return held.to(like.dtype)


@dataclass(frozen=True)
class DropoutMask(Mask):
    """Zeros and one other number: `scale` is what the drawn ones were divided or multiplied by."""

    scale: tuple[str, float] = field(default=("mul", 1.0), repr=False)

    def encode(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """One bit per element."""
        return [pack(tensor != 0, 1)]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Zeros and ones, scaled as the operator did."""
        held = unpack(residuals[0], 1, like.numel()).view(like.shape).to(like.dtype)
        kind, factor = self.scale
        return held / factor if kind == "div" else held * factor


@dataclass(frozen=True)
class WindowIndex(Mask):
    """A pooling index as the position inside its window."""

    kernel: tuple[int, int] = field(default=(1, 1), repr=False)
    stride: tuple[int, int] = field(default=(1, 1), repr=False)
    padding: tuple[int, int] = field(default=(0, 0), repr=False)
    dilation: tuple[int, int] = field(default=(1, 1), repr=False)
    plane: fx.Node | None = field(default=None, repr=False)

    positional = True

    @property
    def sizes(self) -> tuple[tuple[fx.Node, int], ...]:
        """The width of the pooled plane."""
        return ((self.plane, value(self.plane).ndim - 1),) if self.plane is not None else ()

    @property
    def _bits(self) -> int:
        return max(1, math.ceil(math.log2(self.kernel[0] * self.kernel[1])))

    def bits_per_element(self, dtype: torch.dtype) -> float:
        """As many as the window needs."""
        return float(self._bits)

    def _origin(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(like.shape[-2], device=like.device) * self.stride[0] - self.padding[0]
        columns = torch.arange(like.shape[-1], device=like.device) * self.stride[1] - self.padding[1]
        return rows[:, None], columns[None, :]

    def encode(self, tensor: torch.Tensor, width: Any = None) -> Sequence[torch.Tensor]:
        """Row times kernel width plus column, inside the window."""
        top, left = self._origin(tensor)
        row = torch.div(tensor - tensor % width, width, rounding_mode="floor")
        inside = (row - top) // self.dilation[0] * self.kernel[1] + (tensor % width - left) // self.dilation[1]
        return [pack(inside.to(torch.uint8), self._bits)]

    def decode(self, residuals: Sequence[torch.Tensor], like: torch.Tensor, width: Any = None) -> torch.Tensor:
        """The index in the plane."""
        inside = unpack(residuals[0], self._bits, like.numel()).view(like.shape).to(torch.int64)
        top, left = self._origin(like)
        row = top + inside // self.kernel[1] * self.dilation[0]
        index: torch.Tensor = row * width + left + inside % self.kernel[1] * self.dilation[1]
        return index


def dropout_scale(node: fx.Node) -> tuple[str, float] | None:
    """What the zeros and ones behind a dropout mask were scaled by; None if the value is no dropout mask."""
    scale = ("mul", 1.0)
    scaled = False
    while node.op == "call_function":
        name = getattr(node.target, "__name__", "").split(".")[0].rstrip("_")
        if name == "bernoulli":
            return scale
        if name == "permute":
            node = node.args[0]  # type: ignore[assignment]
            continue
        if name not in ("div", "mul") or scaled or not isinstance(node.args[0], fx.Node):
            return None
        factor = node.args[1]
        if isinstance(factor, fx.Node) or not isinstance(factor, (int, float)):
            return None
        scale, scaled = (name, float(factor)), True
        node = node.args[0]
    return None


def _window(node: fx.Node) -> SavedCodec | Declined:
    if not is_pool_index(node):
        return Declined("integers are stored as they are")
    pool = producer(node)
    args: list[Any] = list(pool.args)
    plane = args[0]
    kernel = _pair(args[1])
    stride = _pair(args[2]) if len(args) > 2 and args[2] else kernel
    padding = _pair(args[3]) if len(args) > 3 else (0, 0)
    dilation = _pair(args[4]) if len(args) > 4 else (1, 1)
    if kernel[0] * kernel[1] > 256:
        return Declined(f"a window of {kernel[0]} x {kernel[1]} positions does not fit a byte")
    return WindowIndex(kernel=kernel, stride=stride, padding=padding, dilation=dilation, plane=plane)


def _pair(given: Any) -> tuple[int, int]:
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    return int(numbers[0]), int(numbers[-1])
