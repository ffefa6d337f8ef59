"""Line charts as inline SVG: no script, no network; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
"""Classes `line0` .. `line7` that the page's style sheet must define; further lines repeat them, dashed."""

SIZE = 640, 300
"""Width and height of a chart, in the units of its text (12)."""

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40


@dataclass(frozen=True)
class Series:
    """One line: its name and its points, in order; y may be nan where there is none."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_range: tuple[float, float],
    percent: bool = False,
    size: tuple[int, int] = SIZE,
) -> str:
    """A chart with axes, one line per series and a tooltip on every point.

    Args:
        series: The lines.
        title: Read out by screen readers.
        x_label: What the horizontal axis counts.
        y_range: Lowest and highest value of the vertical axis.
        percent: Whether values are shares, shown as per cent.
        size: Its width and height; a smaller one has larger text where both are drawn equally wide.
    """
    width, height = size
    low, high = y_range
    end = max((x for one in series for x, _ in one.points), default=1.0) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        inside = min(max(y, low), high)
        across = LEFT + (width - LEFT - RIGHT) * x / end
        return round(across, 1), round(TOP + (height - TOP - BOTTOM) * (high - inside) / (high - low), 1)

    def shown(y: float) -> str:
        return f"{100 * y:.4g} %" if percent else f"{y:.3g}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in ticks(low, high):
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{shown(tick)}</text>')
    for tick in ticks(0, end):
        x, _ = place(tick, low)
        parts.append(f'<text class="tick" x="{x}" y="{height - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + width - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for number, one in enumerate(series):
        drawn = [(x, y) for x, y in one.points if not math.isnan(y)]
        path = " ".join("{},{}".format(*place(x, y)) for x, y in drawn)
        parts.append(f'<polyline class="{line_class(number)}" points="{path}"/>')
        for x, y in drawn:
            cx, cy = place(x, y)
            tip = escape(f"{one.name}: {shown(y)} at {x:g}")
            parts.append(
                f'<circle class="{line_class(number)}" cx="{cx}" cy="{cy}" r="2.5"><title>{tip}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def line_class(number: int) -> str:
    """The style class of a chart's line of that number."""
    return f"line{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two numbers, about as many as wanted."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * scale >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
