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

import json
import pathlib
from dataclasses import asdict
from typing import Any, Literal

from graphrewrite.passes.compression._derivative_tables import derivative_table
from graphrewrite.passes.compression._primitive_tables import primitive_table
from graphrewrite.passes.compression._samples import Samples, Scalar, Table, Weight

from graphrewrite.errors import RuleError

Objective = Literal["derivative", "primitive"]

_TABLES: dict[tuple[Any, ...], Table] = {}
_REFUSED: dict[tuple[Any, ...], RuleError] = {}
_SAMPLES: dict[tuple[Any, ...], Samples] = {}


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
        if where[:1] + where[2:3] in _REFUSED:
            raise _REFUSED[where[:1] + where[2:3]]
        try:
            samples = _samples(fn, weight, key)
        except RuleError as error:
            if key:
                _REFUSED[key, weight] = error
            raise
        if objective == "derivative":
            found = derivative_table(samples, bits, contiguous=contiguous)
        else:
            found = primitive_table(samples, bits, pinned=pinned)
        _TABLES[where] = found
    return found


def _samples(fn: Scalar, weight: Weight, name: str) -> Samples:
    """The samples of a function; those of the last few are kept, for its other sizes."""
    where = (name or fn, weight)
    found = _SAMPLES.pop(where, None)
    if found is None:
        found = Samples.of(fn, weight, name or getattr(fn, "__qualname__", type(fn).__name__))
    _SAMPLES[where] = found
    while len(_SAMPLES) > 4:
        del _SAMPLES[next(iter(_SAMPLES))]
    return found


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
            tuple(where): Table(
                held["bits"],
                tuple(held["borders"]),
                tuple(held["codes"]),
                tuple(held["levels"]),
                held["error"],
                held["primitive_error"],
                held["bound"],
            )
            for where, held in rows
        }
    except (ValueError, TypeError, KeyError) as error:
        raise RuleError(f"{path} holds no tables", remedy="write one with save_tables(path)") from error
    _TABLES.update(loaded)
    return len(loaded)
