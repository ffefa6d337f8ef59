"""Saved values by layer, identical layers merged, and live bytes as a small text plot."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphrewrite.analysis.liveness import Curve
from graphrewrite.report.summary import SavedRow

BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class LayerValue:
    """A value that each of some identical layers saves.

    Attributes:
        module: Path of the module that computed it, below its layer; "" for the layer itself.
        operator: What computed it.
        type: dtype and shape.
        kind: As in `SavedRow`.
        codec: As in `SavedRow`.
        nbytes: Bytes in one layer.
        lives: For each layer, the operators that compute it and read it last, counted in the order in which they run.
    """

    module: str
    operator: str
    type: str
    kind: str
    codec: str
    nbytes: int
    lives: tuple[tuple[int, int], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that save the same."""

    layers: tuple[str, ...]
    values: tuple[LayerValue, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its layers."""
        return len(self.layers) * sum(v.nbytes for v in self.values)


def by_layer(rows: Sequence[SavedRow], order: Sequence[str]) -> list[LayerGroup]:
    """Group what is stored (inputs and parameters are referenced, not stored) by block, and merge equal blocks.

    Args:
        rows: `report.saved`.
        order: Block names in the order to list them in; unknown ones come last.
    """
    layers: dict[str, list[LayerValue]] = {}
    for row in rows:
        if row.nbytes:
            lives = ((row.born, row.dies),)
            where = _below(row.module, row.block)
            value = LayerValue(where, row.operator, row.type, row.kind, row.codec, row.nbytes, lives)
            layers.setdefault(row.block, []).append(value)
    groups: dict[tuple[LayerValue, ...], list[str]] = {}
    rank = {name: i for i, name in enumerate(order)}
    for name in sorted(layers, key=lambda n: rank.get(n, len(rank))):
        groups.setdefault(tuple(layers[name]), []).append(name)
    return [
        LayerGroup(
            tuple(names),
            tuple(
                dataclasses.replace(value, lives=tuple(layers[name][i].lives[0] for name in names))
                for i, value in enumerate(values)
            ),
        )
        for values, names in groups.items()
    ]


def _below(module: str, block: str) -> str:
    root = block.partition("@")[0].partition("#")[0]
    if module == root:
        return ""
    return module.removeprefix(f"{root}.") if root else module


def range_of(names: Sequence[str]) -> str:
    """`h.0, h.1, h.2` -> `h.0 .. h.2 (3 layers)`."""
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)} layers)"


def lifetime(value: LayerValue) -> tuple[str, str]:
    """When a value is born and dies: operator numbers, `3 .. 12` over the layers of a group."""
    first, last = value.lives[0], value.lives[-1]
    born, dies = (str(a) if a == b else f"{a} .. {b}" for a, b in zip(first, last, strict=True))
    return born, dies


def plot(curves: Sequence[Curve], *, width: int = 72, height: int = 8) -> tuple[list[str], list[int]]:
    """Curves one after the other as rows of block characters, the highest row first.

    Each column is the maximum of the steps that fall into it; all curves have one scale.

    Returns:
        The rows, and for each curve the column in which it begins.
    """
    values = [live for curve in curves for live in curve.live]
    if not values:
        return [], []
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    tops = [max(values[a:b]) for a, b in itertools.pairwise(edges)]
    peak = max(max(tops), 1)
    levels = [round(top / peak * height * 8) for top in tops]
    rows = ["".join(BARS[min(8, max(0, level - 8 * row))] for level in levels) for row in reversed(range(height))]
    starts, before = [], 0
    for curve in curves:
        starts.append(round(before * columns / len(values)))
        before += len(curve.live)
    return rows, starts
