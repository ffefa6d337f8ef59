"""A simulated pipeline schedule: as plain data, as a drawing, and as a trace."""

from __future__ import annotations

from html import escape
from typing import Any

from graphrewrite.backends.distributed.simulate import StageCost, Timeline
from graphrewrite.report.page import page
from graphrewrite.report.svg import ticks

NAMES = {"F": "forward", "I": "input cotangents", "W": "weight gradients", "B": "backward"}

WIDTH, LEFT, RIGHT, LANE = 960, 90, 14, 34


def to_json(timeline: Timeline, schedule: str, micro_batches: int, costs: list[StageCost]) -> dict[str, Any]:
    """The timeline as plain data."""
    return {
        "schedule": schedule,
        "processes": len(timeline.spans),
        "micro_batches": micro_batches,
        "makespan": timeline.makespan,
        "bubble": timeline.bubble,
        "peak_bytes": timeline.peak,
        "messages": timeline.messages,
        "stages": [
            {
                "forward": one.forward,
                "backward": one.backward,
                "weight": one.weight,
                "saved_bytes": one.saved,
                "held_bytes": one.held,
            }
            for one in costs
        ],
        "actions": [
            {
                "process": span.rank,
                "kind": span.action.kind,
                "stage": span.action.stage,
                "micro_batch": span.action.micro_batch,
                "start": span.start,
                "end": span.end,
            }
            for own in timeline.spans
            for span in own
        ],
    }


def to_trace(timeline: Timeline, title: str) -> dict[str, Any]:
    """A trace for Perfetto or chrome://tracing: a thread per process of the pipeline.

    The longest action lasts a millisecond.
    """
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": title}}]
    longest = max((s.end - s.start for own in timeline.spans for s in own), default=0.0) or 1.0
    scale = 1000.0 / longest
    for rank, own in enumerate(timeline.spans):
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": rank, "args": {"name": f"process {rank}"}})
        for span in own:
            args = {"stage": span.action.stage, "micro_batch": span.action.micro_batch}
            events.append(
                {
                    "ph": "X",
                    "name": str(span.action),
                    "cat": NAMES[span.action.kind],
                    "ts": span.start * scale,
                    "dur": (span.end - span.start) * scale,
                    "pid": 1,
                    "tid": rank,
                    "args": args,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"unit": "counted, not measured"}}


def to_svg(timeline: Timeline, title: str) -> str:
    """A drawing: a lane per process, light and dark."""
    height = LANE * len(timeline.spans) + 62
    scale = (WIDTH - LEFT - RIGHT) / (timeline.makespan or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pipeline" viewBox="0 0 {WIDTH} {height}" role="img"',
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>',
        f'<rect class="back" width="{WIDTH}" height="{height}"/>',
    ]
    for rank, own in enumerate(timeline.spans):
        y = 8 + rank * LANE
        parts.append(f'<text class="label" x="{LEFT - 8}" y="{y + 18}" text-anchor="end">process {rank}</text>')
        for span in own:
            x, width = LEFT + span.start * scale, max((span.end - span.start) * scale, 0.5)
            action = span.action
            tip = f"{NAMES[action.kind]} of micro-batch {action.micro_batch}, stage {action.stage}"
            text = str(action.micro_batch)
            label = f'<text x="{x + width / 2:.1f}" y="{y + 18}" text-anchor="middle">{text}</text>'
            parts.append(
                f'<g class="{NAMES[action.kind].split()[0]}"><title>{escape(tip)}</title>'
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 8}"/>'
                f"{label if width > 7 * len(text) + 2 else ''}</g>"
            )
    bottom = 8 + LANE * len(timeline.spans)
    for tick in ticks(0, timeline.makespan, 6):
        x = LEFT + tick * scale
        parts.append(f'<text class="label" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:.3g}</text>')
    x = float(LEFT)
    for kind in dict.fromkeys(span.action.kind for own in timeline.spans for span in own):
        name = NAMES[kind]
        parts.append(f'<g class="{name.split()[0]}"><rect x="{x}" y="{bottom + 28}" width="12" height="12"/></g>')
        parts.append(f'<text class="label" x="{x + 18}" y="{bottom + 38}">{name}</text>')
        x += 40 + 7 * len(name)
    return "\n".join([*parts, "</svg>\n"])


def pipeline_page(timeline: Timeline, title: str) -> str:
    """The drawing on a page; one file, no network, no script."""
    peaks = "".join(
        f'<tr><td>process {rank}</td><td class="number">{peak:,.0f}</td></tr>'
        for rank, peak in enumerate(timeline.peak)
    )
    about = (
        f"Simulated, nothing was run: {100 * timeline.bubble:.1f} % of the processes' time is spent waiting. "
        "Time is counted in operations and moved elements."
    )
    return page(
        title,
        f"<h1>{escape(title)}</h1><p>{about}</p><figure>{to_svg(timeline, title)}</figure>",
        f"<table><thead><tr><th></th><th>peak bytes</th></tr></thead><tbody>{peaks}</tbody></table>",
    )


_STYLE = """
.pipeline { --back: #ffffff; --text: #1c2024; --soft: #5b6570;
  --f: #bcd7ee; --i: #f6cdb0; --w: #bfe3cd; --b: #e6c3e1 }
@media (prefers-color-scheme: dark) {
  .pipeline { --back: #14181c; --text: #e6e9ec; --soft: #a0abb6;
    --f: #1f4c74; --i: #7a4218; --w: #1d5c39; --b: #6a2f62 }
}
.pipeline .back { fill: var(--back) }
.pipeline text { font: 11px system-ui, sans-serif; fill: var(--text) }
.pipeline .label { fill: var(--soft) }
.pipeline g rect { stroke: var(--back); stroke-width: .5 }
.forward rect { fill: var(--f) } .input rect { fill: var(--i) }
.weight rect { fill: var(--w) } .backward rect { fill: var(--b) }
"""
