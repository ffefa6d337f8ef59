"""The timeline of a step: what runs in which order, in which phase, and how many bytes are alive after it.

Time is counted in operators, one step each: nothing is run. Bytes are those of the liveness prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import fx

from graphrewrite.analysis.cost import flops
from graphrewrite.analysis.liveness import Curve, backward_curve, forward_curve, weight_curve
from graphrewrite.graph.nodes import info, is_backward, is_getitem, nbytes, value
from graphrewrite.graph.partition import Partition
from graphrewrite.graph.text import Names, operator_name
from graphrewrite.report.page import page
from graphrewrite.report.svg import ticks

PHASES = ("forward", "early local backward", "backward", "backward weight")

WIDTH, LEFT, RIGHT, LANE, CHART = 960, 150, 14, 30, 170


@dataclass(frozen=True)
class Step:
    """One operator of the timeline.

    Attributes:
        node: Its node.
        name: Its printed name.
        phase: One of `PHASES`.
        live: Bytes alive right after it, before anything is freed.
        flops: Its floating-point operations.
    """

    node: fx.Node
    name: str
    phase: str
    live: int
    flops: int


@dataclass(frozen=True)
class Segment:
    """Consecutive operators of one phase and block.

    Attributes:
        phase: One of `PHASES`.
        block: Their block.
        start: Position of the first one in the timeline.
        steps: The operators.
    """

    phase: str
    block: str
    start: int
    steps: tuple[Step, ...]

    @property
    def peak(self) -> int:
        """The most bytes alive after one of its operators."""
        return max(step.live for step in self.steps)

    @property
    def flops(self) -> int:
        """Floating-point operations of all of it."""
        return sum(step.flops for step in self.steps)


def timeline(part: Partition) -> list[Step]:
    """All operators in the order in which they run."""
    names = Names(part.graph)
    steps: list[Step] = []
    for stage in part.order:
        curve = _curve(part, stage)
        for node, live in zip(curve.nodes, curve.live, strict=True):
            if not is_getitem(node):
                steps.append(Step(node, names[node], _phase(stage, node), live, flops(node)))
    return steps


def segments(steps: Sequence[Step]) -> list[Segment]:
    """The timeline cut where the phase or the block changes."""
    found: list[Segment] = []
    start = 0
    for i in range(1, len(steps) + 1):
        if i == len(steps) or _place(steps[i]) != _place(steps[start]):
            phase, block = _place(steps[start])
            found.append(Segment(phase, block, start, tuple(steps[start:i])))
            start = i
    return found


def to_json(part: Partition) -> dict[str, Any]:
    """The timeline as plain data: its segments, and every operator in order."""
    steps = timeline(part)
    return {
        "steps": len(steps),
        "saved_bytes": part.saved_bytes,
        "peak_bytes": max((step.live for step in steps), default=0),
        "segments": [
            {
                "phase": one.phase,
                "block": one.block,
                "start": one.start,
                "operators": len(one.steps),
                "flops": one.flops,
                "peak_bytes": one.peak,
                "live_bytes": one.steps[-1].live,
            }
            for one in segments(steps)
        ],
        "operators": [
            {
                "name": step.name,
                "operator": operator_name(step.node),
                "phase": step.phase,
                "block": info(step.node).block,
                "live_bytes": step.live,
                "flops": step.flops,
            }
            for step in steps
        ],
    }


def to_trace(part: Partition, title: str) -> dict[str, Any]:
    """The timeline as a trace for Perfetto or chrome://tracing: a thread per phase, a counter of live bytes.

    A microsecond of the trace stands for one operator.
    """
    steps = timeline(part)
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": title}}]
    used = [phase for phase in PHASES if any(step.phase == phase for step in steps)]
    for i, phase in enumerate(used):
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": phase}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": i, "args": {"sort_index": i}})
    for one in segments(steps):
        lane = used.index(one.phase)
        args = {"operators": len(one.steps), "flops": one.flops, "peak_bytes": one.peak}
        name, cat = one.block or "(no block)", "block"
        events.append(_span(name, cat, one.start, len(one.steps), lane, args))
        events += [
            _span(step.name, one.phase, one.start + i, 1, lane, _about(step)) for i, step in enumerate(one.steps)
        ]
    for i, step in enumerate(steps):
        events.append({"ph": "C", "name": "live bytes", "pid": 1, "ts": i, "args": {"bytes": step.live}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"unit": "1 us = 1 operator, not measured"}}


def to_svg(part: Partition, title: str, marks: Mapping[str, int] | None = None) -> str:
    """The timeline as a drawing: a lane per phase, and the live bytes below, light and dark.

    Args:
        part: What runs.
        title: Read out by screen readers.
        marks: Name -> bytes: lines across the curve, a measured peak for one.
    """
    steps = timeline(part)
    found = segments(steps)
    used = [phase for phase in PHASES if any(one.phase == phase for one in found)]
    height = LANE * len(used) + CHART + 58
    scale = (WIDTH - LEFT - RIGHT) / max(len(steps), 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="schedule" viewBox="0 0 {WIDTH} {height}" role="img"',
        f'aria-label="{escape(title)}"><style>{_style()}</style>',
        f'<rect class="back" width="{WIDTH}" height="{height}"/>',
    ]
    for lane, phase in enumerate(used):
        y = 8 + lane * LANE
        parts.append(f'<text class="label" x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{phase}</text>')
        parts += [_bar(one, y, scale, used) for one in found if one.phase == phase]
    return "\n".join([*parts, *_bytes_chart(steps, 16 + LANE * len(used), scale, marks or {}), "</svg>\n"])


def schedule_page(part: Partition, title: str) -> str:
    """The drawing with its segments in a table; one file, no network, no script."""
    rows = "".join(
        f"<tr><td>{one.start}</td><td>{one.phase}</td><td>{escape(one.block or '(no block)')}</td>"
        f'<td class="number">{len(one.steps)}</td><td class="number">{one.flops:,}</td>'
        f'<td class="number">{one.peak:,}</td><td class="number">{one.steps[-1].live:,}</td></tr>'
        for one in segments(timeline(part))
    )
    about = (
        f"One step in {len(timeline(part)):,} operators, in the order in which they run; {part.saved_bytes:,} bytes "
        "are saved between the forward and the backward. Parameters, buffers and the batch are not counted."
    )
    heads = ["from step", "phase", "block", "operators", "FLOPs", "peak bytes", "live bytes at its end"]
    head = "".join(f"<th>{one}</th>" for one in heads)
    return page(
        title,
        f"<h1>{escape(title)}</h1>",
        f"<p>{about}</p>",
        f"<figure>{to_svg(part, title)}</figure><h2>Segments</h2>",
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>',
    )


def _curve(part: Partition, stage: str) -> Curve:
    if stage == "forward":
        return forward_curve(part)
    if stage == "backward":
        return backward_curve(part)
    return weight_curve(part)


def _phase(stage: str, node: fx.Node) -> str:
    if stage == "forward":
        return "early local backward" if is_backward(node) else "forward"
    return "backward weight" if stage == "weight" else "backward"


def _place(step: Step) -> tuple[str, str]:
    return step.phase, info(step.node).block


def _span(name: str, cat: str, start: int, length: int, lane: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": length, "pid": 1, "tid": lane, "args": args}


def _about(step: Step) -> dict[str, Any]:
    own = info(step.node)
    return {
        "operator": operator_name(step.node),
        "role": str(own.role),
        "block": own.block,
        "module": own.module,
        "source": own.source,
        "bytes": nbytes(value(step.node)),
        "live_bytes": step.live,
        "flops": step.flops,
    }


def _bar(one: Segment, y: int, scale: float, used: Sequence[str]) -> str:
    x, width = LEFT + one.start * scale, max(len(one.steps) * scale, 0.5)
    name = one.block or "(no block)"
    tip = f"{name}: {len(one.steps)} operators, {one.flops:,} FLOPs, peak {one.peak:,} bytes"
    label = f'<text x="{x + 3:.1f}" y="{y + 15}">{escape(name)}</text>' if width > 7 * len(name) + 6 else ""
    return (
        f'<g class="phase{PHASES.index(one.phase)}"><title>{escape(tip)}</title>'
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 8}"/>{label}</g>'
    )


def _bytes_chart(steps: Sequence[Step], top: int, scale: float, marks: Mapping[str, int]) -> list[str]:
    peak = max([*(step.live for step in steps), *marks.values()], default=0) or 1
    top_live = max((step.live for step in steps), default=0)
    bottom = top + CHART

    def y(live: float) -> float:
        return bottom - CHART * live / peak

    points = [f"{LEFT},{bottom}"]
    for i, step in enumerate(steps):
        points += [f"{LEFT + i * scale:.1f},{y(step.live):.1f}", f"{LEFT + (i + 1) * scale:.1f},{y(step.live):.1f}"]
    points.append(f"{LEFT + len(steps) * scale:.1f},{bottom}")
    parts = []
    for tick in ticks(0, peak, 4):
        at = f"{y(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="label" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,.0f} B</text>')
    for number in ticks(0, len(steps), 8):
        x = LEFT + number * scale
        parts.append(f'<text class="label" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number:g}</text>')
    parts.append(f'<polygon points="{" ".join(points)}"><title>live bytes, peak {top_live:,}</title></polygon>')
    for name, count in marks.items():
        at = f"{y(count):.1f}"
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        text = f"{escape(name)} {count:,} B"
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y(count) + 13:.1f}" text-anchor="end">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{bottom + 32}" text-anchor="middle">operators</text>')
    return parts


def _style() -> str:
    return """
.schedule { --back: #ffffff; --text: #1c2024; --soft: #5b6570; --rule: #d5dae0; --area: #cfe0f1;
  --p0: #bcd7ee; --p1: #f6cdb0; --p2: #e6c3e1; --p3: #bfe3cd }
@media (prefers-color-scheme: dark) {
  .schedule { --back: #14181c; --text: #e6e9ec; --soft: #a0abb6; --rule: #343c44; --area: #23405a;
    --p0: #1f4c74; --p1: #7a4218; --p2: #6a2f62; --p3: #1d5c39 }
}
.schedule .back { fill: var(--back) }
.schedule text { font: 11px system-ui, sans-serif; fill: var(--text) }
.schedule .label { fill: var(--soft) }
.schedule line { stroke: var(--rule) }
.schedule .mark { stroke: var(--text); stroke-dasharray: 5 3 }
.schedule polygon { fill: var(--area); stroke: var(--soft); stroke-width: 1 }
.schedule g rect { stroke: var(--back); stroke-width: .5 }
.phase0 rect { fill: var(--p0) } .phase1 rect { fill: var(--p1) }
.phase2 rect { fill: var(--p2) } .phase3 rect { fill: var(--p3) }
"""
