"""Scalar functions, their derivatives and quadrature; tables that stand for the derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from graphrewrite.errors import RuleError

Array = NDArray[np.float64]
Weight = Literal["uniform", "normal"]
Scalar = Callable[[torch.Tensor], torch.Tensor]

DOMAIN = 20.0
"""Tables are made for [-20, 20]; beyond it the first and the last level go on."""

PER_UNIT = 2400
"""Fine cells per unit: kinks and jumps at multiples of 1/2400 are met exactly."""

LOBATTO = np.array([-1.0, -(5.0**-0.5), 5.0**-0.5, 1.0])
LOBATTO_WEIGHTS = np.array([1.0, 5.0, 5.0, 1.0]) / 12.0
_INWARD = 1e-9


@dataclass(frozen=True)
class Table:
    """A piecewise-constant stand-in for a derivative.

    Attributes:
        bits: Size of a code.
        borders: Where the level changes, ascending; an interval holds its left border.
        codes: The code of each interval, one more than borders.
        levels: The derivative that a code stands for.
        error: Squared L2 distance to the derivative, ∫ (f' - q)² w.
        primitive_error: Squared L2 distance of the primitives, ∫ (f - ∫q)² w, at the best constant of integration.
        bound: No table of so many levels has a smaller `error` (`primitive_error` for that objective); 0 where none
            was proved.
    """

    bits: int
    borders: tuple[float, ...]
    codes: tuple[int, ...]
    levels: tuple[float, ...]
    error: float
    primitive_error: float
    bound: float = 0.0

    def derivative(self, x: Array) -> Array:
        """The table's derivative at `x`."""
        found: Array = np.asarray(self.levels)[np.asarray(self.codes)[np.searchsorted(self.borders, x, side="right")]]
        return found


@dataclass(frozen=True, eq=False)
class Samples:
    """A scalar function and its derivative on [-20, 20], with quadrature.

    Attributes:
        edges: Edges of the fine cells.
        x: Quadrature nodes, one row per cell, the outer two just inside the edges.
        value: The function there.
        slope: Its derivative there.
        mass: Quadrature weights times w(x).
    """

    edges: Array
    x: Array
    value: Array
    slope: Array
    mass: Array

    @staticmethod
    def of(fn: Scalar, weight: Weight, name: str) -> Samples:
        """Evaluate `fn` in float64."""
        count = int(DOMAIN * PER_UNIT)
        edges = np.arange(-count, count + 1) / PER_UNIT
        half = 0.5 / PER_UNIT
        x = (edges[:-1] + half)[:, None] + half * (1 - _INWARD) * LOBATTO
        value, slope = evaluate(fn, x, name)
        _check_bounded(fn, x, slope, name)
        density = np.ones_like(x) if weight == "uniform" else np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
        return Samples(edges, x, value, slope, density * LOBATTO_WEIGHTS * 2 * half)

    def errors(self, borders: Array, slopes: Array) -> tuple[float, float]:
        """Both errors of a piecewise-constant derivative: intervals between borders, a slope for each."""
        piece = np.searchsorted(borders, self.x, side="right")
        error = float((self.mass * (self.slope - slopes[piece]) ** 2).sum())
        starts = np.concatenate([[-DOMAIN], borders])
        values = np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(starts))])
        gap = self.value - values[piece] - slopes[piece] * (self.x - starts[piece])
        gap -= (self.mass * gap).sum() / self.mass.sum()
        return error, float((self.mass * gap * gap).sum())


def evaluate(fn: Scalar, x: Array, name: str) -> tuple[Array, Array]:
    """A scalar function and its derivative, in float64.

    Raises:
        RuleError: It is not element-wise, not differentiable or not finite.
    """
    argument = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).requires_grad_()
    with torch.enable_grad():
        out = fn(argument)
        if not isinstance(out, torch.Tensor) or out.shape != argument.shape or not out.requires_grad:
            raise RuleError(
                f"{name} is no differentiable function of one number, element by element",
                remedy="give a function that maps a tensor to one of the same shape",
            )
        (slope,) = torch.autograd.grad(out.sum(), argument)
    return out.detach().double().numpy(), slope.double().numpy()


def _check_bounded(fn: Scalar, x: Array, slope: Array, name: str) -> None:
    """Refuse a derivative that grows without bound, at a point or towards infinity.

    Raises:
        RuleError: It does.
    """
    steep = np.nan_to_num(np.abs(slope), nan=np.inf)
    top = float(steep.max())
    at = float(x.flat[int(steep.argmax())])
    zoom, width = top, 1.0 / PER_UNIT
    for _ in range(24):
        if not np.isfinite(zoom):
            break
        near = at + width * np.linspace(-1, 1, 33)
        slopes = np.nan_to_num(np.abs(evaluate(fn, near, name)[1]), nan=np.inf)
        zoom, at, width = max(zoom, float(slopes.max())), float(near[int(slopes.argmax())]), width / 8
    far = DOMAIN * 2.0 ** np.arange(1, 9)
    ends = np.nan_to_num(evaluate(fn, np.concatenate([-far, far]), name)[1], nan=0.0)
    if not np.isfinite(zoom) or zoom > 2 * top + 1e-12:
        raise RuleError(
            f"the derivative of {name} is unbounded near {round(at, 9) + 0.0:.6g}",
            remedy="no table of finitely many levels stands for it: leave the function out with skip=[module globs]",
        )
    if np.abs(ends).max() > 1.5 * top + 1e-12:
        raise RuleError(
            f"the derivative of {name} is unbounded: it keeps growing away from zero",
            remedy="no table of finitely many levels stands for it: leave the function out with skip=[module globs]",
        )
    last = np.repeat([slope.flat[0], slope.flat[-1]], len(far))
    if np.abs(ends - last).max() > 0.05 * (slope.max() - slope.min()):
        raise RuleError(
            f"the derivative of {name} still changes outside of [-{DOMAIN:g}, {DOMAIN:g}]",
            remedy="tables are made for that interval: leave the function out with skip=[module globs]",
        )
