"""Piecewise-constant derivatives: the best few-bit table of a scalar function, in two norms.

A table replaces f' by 2^b levels. Two objectives:

* derivative: min ∫ (f'(x) - q(x))² w(x) dx. A code names a *level*, and a level may serve several intervals of x, so
  that the optimum is the scalar quantiser of the values f'(x) under w: weighted k-means in one dimension, which a
  dynamic program over sorted values solves exactly. With `contiguous` every level serves one interval, as in FewBit:
  a dynamic program over the intervals of x.
* primitive: min ∫ (f(x) - h(x))² w(x) dx over continuous piecewise linear h; the levels are the slopes of h
  (Approx-BP's objective).

Both errors are told for every table. The dynamic programs put borders on a grid of n cells. Moving a border of the true
optimum to the better end of its cell costs at most (gap of the levels) x (oscillation of f' in the cell) x (mass of
the cell), times 1/2, because there f' is midway between the two levels; the gaps add up to no more than the variation
of f'. That gives `bound`, below which no table of this size can be.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from graphrewrite.errors import RuleError

Array = NDArray[np.float64]
Weight = Literal["uniform", "normal"]
Objective = Literal["derivative", "primitive"]
Scalar = Callable[[torch.Tensor], torch.Tensor]

DOMAIN = 20.0
"""Tables are made for [-20, 20]; beyond it the first and the last level go on."""

_PER_UNIT = 1600
"""Fine cells per unit: kinks and jumps at multiples of 1/1600 are met exactly."""
_CELLS = 16000
_CONTIGUOUS_CELLS = 1800
_LOBATTO = np.array([-1.0, -(5.0**-0.5), 5.0**-0.5, 1.0])
_LOBATTO_WEIGHTS = np.array([1.0, 5.0, 5.0, 1.0]) / 12.0
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
        count = int(DOMAIN * _PER_UNIT)
        edges = np.arange(-count, count + 1) / _PER_UNIT
        half = 0.5 / _PER_UNIT
        x = (edges[:-1] + half)[:, None] + half * (1 - _INWARD) * _LOBATTO
        value, slope = evaluate(fn, x, name)
        _check_bounded(fn, x, slope, name)
        density = np.ones_like(x) if weight == "uniform" else np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
        return Samples(edges, x, value, slope, density * _LOBATTO_WEIGHTS * 2 * half)

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
    zoom, width = top, 1.0 / _PER_UNIT
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
            f"the derivative of {name} is unbounded near {at:.6g}",
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


# --- the derivative norm -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Cells:
    """Cells of a grid: where they begin, mass, first and second moment of f', oscillation of f'."""

    starts: Array
    mass: Array
    first: Array
    second: Array
    swing: Array


def _cells(samples: Samples, count: int) -> _Cells:
    """A grid on which oscillation x mass is about the same in every cell; jumps of f' are edges."""
    low, high = samples.slope.min(1), samples.slope.max(1)
    mass = samples.mass.sum(1)
    density = np.sqrt((high - low) * mass)
    reach = np.concatenate([[0.0], np.cumsum(density)])
    number = np.floor(reach / max(reach[-1], 1e-300) * count)
    chosen = np.flatnonzero(np.diff(number)) + 1
    jumps = np.flatnonzero(np.abs(samples.slope[1:, 0] - samples.slope[:-1, -1]) > 1e-6) + 1
    at = np.unique(np.concatenate([[0], chosen, jumps]))
    at = at[at < len(mass)]
    held = np.add.reduceat(mass, at)
    at = at[held > 0] if (held > 0).any() else at
    at[0] = 0
    first = np.add.reduceat((samples.mass * samples.slope).sum(1), at)
    second = np.add.reduceat((samples.mass * samples.slope**2).sum(1), at)
    swing = np.maximum.reduceat(high, at) - np.minimum.reduceat(low, at)
    return _Cells(samples.edges[at], np.add.reduceat(mass, at), first, second, swing)


class _Spread:
    """∫ (f' - mean)² w over runs of cells in some order, by prefix sums."""

    def __init__(self, cells: _Cells, order: NDArray[np.int64]) -> None:
        # about the mean: the squares of a large common value would drown the differences
        centre = cells.first.sum() / cells.mass.sum()
        first = cells.first - centre * cells.mass
        second = cells.second - 2 * centre * cells.first + centre**2 * cells.mass
        self._mass, self._first, self._second = (
            np.concatenate([[0.0], np.cumsum(part[order])]) for part in (cells.mass, first, second)
        )
        self.count = len(order)

    def __call__(self, begin: Any, end: Any) -> Array:
        """Over cells begin .. end-1; infinite where that is no cell."""
        mass = self._mass[end] - self._mass[begin]
        first = self._first[end] - self._first[begin]
        spread = self._second[end] - self._second[begin] - first * first / np.where(mass > 0, mass, 1.0)
        return np.where(np.asarray(end) > np.asarray(begin), np.maximum(spread, 0.0), np.inf)


def _split(spread: _Spread, pieces: int, layer: Callable[[_Spread, Array], tuple[Array, Any]]) -> Array:
    """Ends of the optimal runs, and nothing but that: the dynamic program over 1 .. pieces runs."""
    best = spread(np.zeros(spread.count + 1, dtype=np.int64), np.arange(spread.count + 1))
    choices = []
    for _ in range(1, pieces):
        best, chosen = layer(spread, best)
        choices.append(chosen)
    ends = [spread.count]
    for chosen in reversed(choices):
        ends.append(int(chosen[ends[-1]]))
    return np.array(ends[::-1], dtype=np.int64)


def _any_layer(spread: _Spread, best: Array) -> tuple[Array, Any]:
    """One more run: every last border for every end."""
    count = spread.count
    after, chosen = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=np.int64)
    begin = np.arange(count)[:, None]
    for low in range(0, count + 1, 256):
        end = np.arange(low, min(low + 256, count + 1))
        total = best[: end[-1] + 1, None][:count] + spread(begin[: end[-1] + 1], end[None, :])
        chosen[end] = total.argmin(0)
        after[end] = total[chosen[end], np.arange(len(end))]
    return after, chosen


def _monotone_layer(spread: _Spread, best: Array) -> tuple[Array, Any]:
    """One more run where the last border moves with the end: over sorted values. Halving, a whole level at once."""
    count = spread.count
    after, chosen = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=np.int64)
    low, high = np.array([1]), np.array([count])
    left, right = np.array([0]), np.array([count - 1])
    while len(low):
        middle = (low + high) // 2
        until = np.maximum(np.minimum(right, middle - 1), left)
        sizes = until - left + 1
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        begin = np.arange(sizes.sum()) - np.repeat(starts - left, sizes)
        total = best[begin] + spread(begin, np.repeat(middle, sizes))
        least = np.minimum.reduceat(total, starts)
        hits = np.flatnonzero(total == np.repeat(least, sizes))
        taken = begin[hits[np.searchsorted(hits, starts)]]
        after[middle], chosen[middle] = least, taken
        keep_left, keep_right = low < middle, middle < high
        low, high, left, right = (
            np.concatenate(pair)
            for pair in (
                (low[keep_left], middle[keep_right] + 1),
                (middle[keep_left] - 1, high[keep_right]),
                (left[keep_left], taken[keep_right]),
                (taken[keep_left], right[keep_right]),
            )
        )
    return after, chosen


def derivative_table(samples: Samples, bits: int, *, contiguous: bool = False) -> Table:
    """The best table in the derivative norm."""
    cells = _cells(samples, _CONTIGUOUS_CELLS if contiguous else _CELLS)
    means = cells.first / cells.mass
    order = np.arange(len(means)) if contiguous else np.argsort(means, kind="stable")
    spread = _Spread(cells, order)
    pieces = min(2**bits, len(means))
    ends = _split(spread, pieces, _any_layer if contiguous else _monotone_layer)
    runs = np.zeros(len(means), dtype=np.int64)
    runs[order] = np.searchsorted(ends, np.arange(len(means)), side="right")
    grid = float(spread(np.concatenate([[0], ends[:-1]]), ends).sum())
    changes = np.flatnonzero(np.diff(runs)) + 1
    borders, codes = cells.starts[changes], runs[np.concatenate([[0], changes])]
    borders, levels = _polish(samples, borders, codes, pieces)
    variation = float(np.abs(np.diff(samples.slope.ravel())).sum())
    slack = 0.5 * variation * float((cells.swing * cells.mass).max())
    error, primitive = samples.errors(borders, levels[codes])
    levels = np.concatenate([levels, np.full(2**bits - pieces, levels[-1])])
    return Table(
        bits,
        tuple(borders.tolist()),
        tuple(codes.tolist()),
        tuple(levels.tolist()),
        error,
        primitive,
        max(0.0, grid - slack),
    )


def _polish(samples: Samples, borders: Array, codes: NDArray[np.int64], pieces: int) -> tuple[Array, Array]:
    """Levels are means and borders midpoints, in turn, until they stay: from a grid to the continuum."""
    x, slope, mass = samples.x.ravel(), samples.slope.ravel(), samples.mass.ravel()
    weighted = np.concatenate([[0.0], np.cumsum(mass * slope)])
    masses = np.concatenate([[0.0], np.cumsum(mass)])
    def means(borders: Array) -> tuple[NDArray[np.int64], Array]:
        at = np.concatenate([[0], np.searchsorted(x, borders), [len(x)]])
        sums, totals = np.zeros(pieces), np.zeros(pieces)
        np.add.at(sums, codes, np.diff(weighted[at]))
        np.add.at(totals, codes, np.diff(masses[at]))
        return at[1:-1], sums / np.where(totals > 0, totals, 1.0)

    at, levels = means(borders)
    for _ in range(60):
        moved = _crossings(x, slope, at, 0.5 * (levels[codes[:-1]] + levels[codes[1:]]))
        if (np.diff(moved) <= 0).any() or np.abs(moved - borders).max(initial=0.0) < 1e-12:
            break
        borders = moved
        at, levels = means(borders)
    return borders, levels


def _crossings(x: Array, slope: Array, at: NDArray[np.int64], wanted: Array) -> Array:
    """Where f' takes the wanted values, near the given nodes; jumps stay where they are."""
    found = np.empty(len(at))
    for i, (near, level) in enumerate(zip(at, wanted, strict=True)):
        begin, end = max(near - 400, 0), min(near + 400, len(x) - 1)
        gap = slope[begin : end + 1] - level
        crossed = np.flatnonzero(gap[:-1] * gap[1:] <= 0) + begin
        if not len(crossed):
            found[i] = 0.5 * (x[near - 1] + x[near])
            continue
        left = crossed[np.abs(crossed - near + 1).argmin()]
        rise = slope[left + 1] - slope[left]
        part = (level - slope[left]) / rise if rise else 0.5
        found[i] = x[left] + part * (x[left + 1] - x[left])
    return found


# --- the primitive norm --------------------------------------------------------------------------------------------


def primitive_table(samples: Samples, bits: int, *, pinned: bool = False) -> Table:
    """The best table in the primitive norm that a search from the optimum without continuity finds.

    Args:
        samples: The function.
        bits: Size of a code.
        pinned: Let the primitive be the function's own straight line outside the first and the last border (for an
            activation like GELU: 0 and x), as Approx-BP does.
    """
    pieces = 2**bits
    begin, bound = _broken_lines(samples, pieces)
    fit = _LineFit(samples, pinned)
    borders = fit.search(begin)
    slopes = fit.slopes(borders)
    error, primitive = samples.errors(borders, slopes)
    return Table(
        bits,
        tuple(borders.tolist()),
        tuple(range(pieces)),
        tuple(slopes.tolist()),
        error,
        primitive,
        bound,
    )


def _broken_lines(samples: Samples, pieces: int, count: int = 700) -> tuple[Array, float]:
    """Borders of the best piecewise linear fit without continuity, and a bound below any fit.

    The bound leaves out, for each border, the cell around it: what remains is fitted by a straight line each.
    """
    mass = samples.mass.sum(1)
    bend = np.abs(np.gradient(samples.slope.mean(1), samples.edges[:-1]))
    density = (bend**2 * mass) ** 0.2 + 1e-3 * mass**0.2
    reach = np.cumsum(density)
    at = np.unique(np.concatenate([[0], np.searchsorted(reach, np.arange(1, count) / count * reach[-1])]))
    x, f, w = samples.x, samples.value, samples.mass
    rows = [np.add.reduceat((w * x**p * f**q).sum(1), at) for p, q in _MOMENTS]
    prefix = np.stack([np.concatenate([[0.0], np.cumsum(row)]) for row in rows])
    n = len(at)
    begin, end = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
    cost = np.where(end > begin, _line_error(prefix[:, None, :] - prefix[:, :, None]), np.inf)
    best, loose = cost[0], cost[0]
    choices = []
    for _ in range(1, pieces):
        total = best[:, None] + cost
        choices.append(total.argmin(0))
        best = total.min(0)
        skipped = np.concatenate([[np.inf], np.minimum(loose, np.concatenate([[0.0], loose[:-1]]))[:-1]])
        loose = np.minimum((skipped[:, None] + cost).min(0), np.concatenate([[np.inf], loose[:-1]]))
    ends = [n]
    for chosen in reversed(choices):
        ends.append(int(chosen[ends[-1]]))
    return samples.edges[at[np.array(ends[:0:-1])]], max(0.0, float(min(loose[-1], loose[-2])))


_MOMENTS = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2))


def _line_error(moments: Array) -> Array:
    """What a straight line leaves of ∫ f² w, from the moments of (x, f)."""
    m, x, xx, f, xf, ff = moments
    safe = np.where(m > 0, m, 1.0)
    across, along = xx - x * x / safe, xf - x * f / safe
    left: Array = ff - f * f / safe - along * along / np.where(across > 1e-14, across, np.inf)
    return np.maximum(left, 0.0)


class _LineFit:
    """Continuous piecewise linear least squares: knots by Gauss and Newton, the values at the knots eliminated."""

    def __init__(self, samples: Samples, pinned: bool, every: int = 8) -> None:
        cells = np.arange(0, len(samples.x), every)
        # one coarse Lobatto rule per `every` fine cells
        half = 0.5 * every / _PER_UNIT
        self._x = (samples.edges[cells][:, None] + half + half * _LOBATTO).ravel()
        fine, values = samples.x.ravel(), samples.value.ravel()
        self._f = np.interp(self._x, fine, values)
        density = (samples.mass / (_LOBATTO_WEIGHTS / _PER_UNIT)).ravel()
        weights = np.tile(_LOBATTO_WEIGHTS * 2 * half, len(cells)) * np.interp(self._x, fine, density)
        self._root = np.sqrt(weights)
        self._ends = (values[0], values[-1], samples.slope.flat[0], samples.slope.flat[-1]) if pinned else None

    def _solve(self, knots: Array) -> tuple[Array, Array, Array]:
        """Slopes of all segments, the weighted residual, and the derivatives of the residual by the knots."""
        at = np.concatenate([[-DOMAIN], knots, [DOMAIN]])
        count = len(at)
        segment = np.clip(np.searchsorted(knots, self._x, side="right"), 0, count - 2)
        part = (self._x - at[segment]) / (at[segment + 1] - at[segment])
        basis = np.zeros((len(self._x), count))
        rows = np.arange(len(self._x))
        basis[rows, segment] = 1 - part
        basis[rows, segment + 1] = part
        basis *= self._root[:, None]
        target = self._f * self._root
        values = np.zeros(count)
        free = np.ones(count, dtype=bool)
        if self._ends is not None:
            first, last, rising, falling = self._ends
            values[[0, -1]] = first, last
            values[1], values[-2] = first + rising * (at[1] + DOMAIN), last - falling * (DOMAIN - at[-2])
            free[[0, 1, -2, -1]] = False
            target = target - basis @ values
        inner = basis[:, free]
        gram = inner.T @ inner
        gram.flat[:: len(gram) + 1] += 1e-13 * max(float(gram.max(initial=0.0)), 1e-300)
        values[free] = np.linalg.solve(gram, inner.T @ target)
        slopes = np.diff(values) / np.diff(at)
        residual = self._f * self._root - basis @ values
        # moving a knot along the line on its left changes the fit right of it by (slope jump) x (hat function); the
        # last of the pinned ones moves along the line on its right
        right = (self._x[:, None] >= knots).astype(np.float64)
        if self._ends is not None:
            right[:, -1] -= 1
        jacobian = basis[:, 1:-1] * right * np.diff(slopes)
        if free.any():
            jacobian = jacobian - inner @ np.linalg.solve(gram, inner.T @ jacobian)
        return slopes, residual, jacobian

    def slopes(self, knots: Array) -> Array:
        """The slopes of the best fit with these knots."""
        return self._solve(knots)[0]

    def search(self, knots: Array) -> Array:
        """Levenberg and Marquardt over the knots, as variable projection."""
        if self._ends is not None and len(knots) == 1:
            first, last, rising, falling = self._ends
            return np.array([(last - first - DOMAIN * (rising + falling)) / (rising - falling)])
        damping = 1e-3
        _, residual, jacobian = self._solve(knots)
        error = float(residual @ residual)
        for _ in range(200):
            normal, pull = jacobian.T @ jacobian, jacobian.T @ residual
            scale = np.diag(np.maximum(normal.diagonal(), 1e-12 * normal.diagonal().max()))
            step = -np.linalg.solve(normal + damping * scale, pull)
            moved = knots + step
            widths = np.diff(np.concatenate([[-DOMAIN], moved, [DOMAIN]]))
            if (widths > 1e-4).all():
                _, new_residual, new_jacobian = self._solve(moved)
                new_error = float(new_residual @ new_residual)
                if new_error < error:
                    done = error - new_error < 1e-10 * error
                    knots, residual, jacobian, error = moved, new_residual, new_jacobian, new_error
                    damping = max(damping / 5, 1e-12)
                    if done:
                        break
                    continue
            damping *= 4
            if damping > 1e8:
                break
        return knots


# --- the cache -----------------------------------------------------------------------------------------------------

_TABLES: dict[tuple[Any, ...], Table] = {}


def table(
    fn: Scalar,
    bits: int,
    *,
    weight: Weight = "uniform",
    objective: Objective = "derivative",
    contiguous: bool = False,
    pinned: bool = False,
    key: str = "",
) -> Table:
    """The best table of a scalar function; computed once per process.

    Args:
        fn: A differentiable function of a tensor, element by element.
        bits: 1 to 4.
        weight: `"uniform"` on [-20, 20] or `"normal"`, N(0, 1).
        objective: Which norm is minimised, `"derivative"` or `"primitive"`.
        contiguous: For the derivative norm: every level serves one interval only.
        pinned: For the primitive norm: the function's own straight lines outside of the borders.
        key: What the function is called in a file of tables; "": it is not written to one.

    Raises:
        RuleError: Bad options, or the derivative is unbounded, or it does not settle inside the domain.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 4:
        raise RuleError(f"bits={bits!r} is out of range", remedy="tables have codes of 1 to 4 bits")
    if weight not in ("uniform", "normal") or objective not in ("derivative", "primitive"):
        raise RuleError(
            f"there is no table with weight={weight!r}, objective={objective!r}",
            remedy="weight is 'uniform' or 'normal', objective 'derivative' or 'primitive'",
        )
    where = (key or fn, bits, weight, objective, contiguous, pinned)
    found = _TABLES.get(where)
    if found is None:
        name = key or getattr(fn, "__qualname__", type(fn).__name__)
        samples = _samples(fn, weight, name)
        if objective == "derivative":
            found = derivative_table(samples, bits, contiguous=contiguous)
        else:
            found = primitive_table(samples, bits, pinned=pinned)
        _TABLES[where] = found
    return found


@functools.lru_cache(maxsize=4)
def _samples(fn: Scalar, weight: Weight, name: str) -> Samples:
    return Samples.of(fn, weight, name)


def save_tables(path: str | pathlib.Path) -> int:
    """Write the tables computed or loaded in this process to a JSON file; returns how many.

    A job that starts with `load_tables(path)` computes none of them again.
    """
    rows = [[list(where), asdict(held)] for where, held in _TABLES.items() if isinstance(where[0], str)]
    pathlib.Path(path).write_text(json.dumps(rows) + "\n")
    return len(rows)


def load_tables(path: str | pathlib.Path) -> int:
    """Read tables that `save_tables` wrote; returns how many.

    Raises:
        RuleError: The file holds no tables.
    """
    try:
        rows = json.loads(pathlib.Path(path).read_text())
        loaded = {
            tuple(where): Table(**{k: tuple(v) if isinstance(v, list) else v for k, v in held.items()})
            for where, held in rows
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise RuleError(f"{path} holds no tables", remedy="write one with save_tables(path)") from error
    _TABLES.update(loaded)
    return len(loaded)
