"""The best tables in the derivative norm: dynamic programs over cells of a grid, then Lloyd's iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from graphrewrite.passes.compression._samples import Array, Samples, Table
from numpy.typing import NDArray

_CELLS = 16000
_CONTIGUOUS_CELLS = 1800


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
    x, slope = samples.x.ravel(), samples.slope.ravel()
    # up to the edges of the fine cells; straight lines in between, so that a border moves the means continuously
    mass = np.concatenate([[0.0], np.cumsum(samples.mass.sum(1))])
    moment = np.concatenate([[0.0], np.cumsum((samples.mass * samples.slope).sum(1))])

    def means(borders: Array) -> tuple[NDArray[np.int64], Array]:
        at = np.concatenate([samples.edges[:1], borders, samples.edges[-1:]])
        sums, totals = np.zeros(pieces), np.zeros(pieces)
        np.add.at(sums, codes, np.diff(np.interp(at, samples.edges, moment)))
        np.add.at(totals, codes, np.diff(np.interp(at, samples.edges, mass)))
        return np.searchsorted(x, borders), sums / np.where(totals > 0, totals, 1.0)

    at, levels = means(borders)
    for _ in range(200):
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
