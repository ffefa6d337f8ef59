"""The best tables in the primitive norm: continuous piecewise linear least squares with free knots."""

from __future__ import annotations

import numpy as np
from graphrewrite.passes.compression._samples import DOMAIN, LOBATTO, LOBATTO_WEIGHTS, PER_UNIT, Array, Samples, Table


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
    found = [fit.search(start) for start in _starts(begin)]
    borders = min(found, key=fit.error)
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


def _starts(begin: Array) -> list[Array]:
    """Where searches begin: with few knots, a fit without continuity can lie far from the best one with it."""
    if len(begin) == 1:
        return [np.array([at]) for at in np.linspace(-0.6, 0.6, 7) * DOMAIN]
    if len(begin) > 3:
        return [begin]
    return [begin, -begin[::-1], 0.5 * (begin - begin[::-1]), 0.25 * begin]


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
    spread = _line_error(prefix[:, None, :] - prefix[:, :, None])
    cost = np.where(end > begin, spread, np.inf)
    # for the bound, pieces may be empty and the cell in front of each but the first is left out
    relaxed = np.where(end > begin, spread, np.where(end == begin, 0.0, np.inf))
    best, loose = cost[0], relaxed[0]
    choices = []
    for _ in range(1, pieces):
        total = best[:, None] + cost
        choices.append(total.argmin(0))
        best = total.min(0)
        loose = (np.concatenate([[np.inf], loose[:-1]])[:, None] + relaxed).min(0)
    ends = [n]
    for chosen in reversed(choices):
        ends.append(int(chosen[ends[-1]]))
    return samples.edges[at[np.array(ends[:0:-1])]], float(loose[-1])


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
        half = 0.5 * every / PER_UNIT
        self._x = (samples.edges[cells][:, None] + half + half * LOBATTO).ravel()
        fine, values = samples.x.ravel(), samples.value.ravel()
        self._f = np.interp(self._x, fine, values)
        density = (samples.mass / (LOBATTO_WEIGHTS / PER_UNIT)).ravel()
        weights = np.tile(LOBATTO_WEIGHTS * 2 * half, len(cells)) * np.interp(self._x, fine, density)
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

    def error(self, knots: Array) -> float:
        """Squared error of the best fit with these knots."""
        residual = self._solve(knots)[1]
        return float(residual @ residual)

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
