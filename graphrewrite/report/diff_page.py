"""The page that `graphrewrite diff --html` writes: two graphs side by side; one file, no network, no script."""

from __future__ import annotations

import itertools
from html import escape

from graphrewrite.graph.text import Line
from graphrewrite.report.diff import BlockDiff, Diff, Row
from graphrewrite.report.page import page

SIGNS = {"removed": "−", "rerouted": "~", "moved": "›", "added": "+", "kept": ""}

OPEN = 12
"""The blocks with changes are open from the start if there are no more of them than this."""

AROUND = 2
"""Operators that stay the same are shown this many before and after a change; longer runs are folded."""

_STYLE = """
body { max-width: none }
.diff { --removed: #fbe3e4; --added: #dff3e4; --rerouted: #fbf0cf; --moved: #e2ecf8 }
.diff { font: 12px ui-monospace, monospace }
@media (prefers-color-scheme: dark) {
  .diff { --removed: #4b1f24; --added: #1c3f2a; --rerouted: #4a3d12; --moved: #1f3450 }
}
.diff summary { font: 14px system-ui, sans-serif; padding: .35rem 0; cursor: pointer }
.diff details details summary { font-size: 12px; padding-left: 2rem; opacity: .75 }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) 1.5rem minmax(0, 1fr) }
.pair > * { padding: 1px 6px; overflow-wrap: anywhere }
.pair i { text-align: center; font-style: normal }
.pair b { font-weight: 600 }
.removed > :first-child { background: var(--removed) } .added > :last-child { background: var(--added) }
.rerouted > span { background: var(--rerouted) } .moved > span { background: var(--moved) }
.count { opacity: .75 }
"""


def diff_page(title: str, diff: Diff) -> str:
    """Both graphs, block by block, with equal operators in one line. Every name of the user's model is escaped."""
    old, new = diff.sides
    changed = sum(bool(block.changes) for block in diff.blocks)
    code = [f"<code>{escape(side)}</code>" for side in (old, new)]
    totals = ", ".join(f"{diff.total(kind)} {kind}" for kind in ("removed", "rerouted", "added", "moved"))
    return page(
        f"{title}: {old}, {new}",
        f"<h1>{escape(title)}</h1>",
        f"<p>{totals}; {_numbers(diff.flops, diff.saved_bytes)}. Left: {code[0]}; right: {code[1]}.</p>",
        '<div class="diff">',
        *[_block(block, opened=bool(block.changes) and changed <= OPEN) for block in diff.blocks],
        "</div>",
        style=_STYLE,
    )


def _numbers(flops: tuple[int, int], saved: tuple[int, int]) -> str:
    return (
        f"FLOPs {flops[0]:,} → {flops[1]:,} ({flops[1] - flops[0]:+,}), "
        f"saved bytes {saved[0]:,} → {saved[1]:,} ({saved[1] - saved[0]:+,})"
    )


def _block(block: BlockDiff, *, opened: bool) -> str:
    rules = f" {escape(block.rules[0])} → {escape(block.rules[1])}" if block.rules[0] != block.rules[1] else ""
    head = (
        f"<strong>{escape(block.block or '(rule state)')}</strong>{rules} "
        f'<span class="count">{len(block.changes)} changes, {block.kept} operators the same; '
        f"{_numbers(block.flops, block.saved_bytes)}</span>"
    )
    return f"<details{' open' if opened else ''}><summary>{head}</summary>{''.join(_rows(block.rows))}</details>"


def _rows(rows: list[Row]) -> list[str]:
    """The rows as HTML; long runs of what stays the same are folded."""
    out = []
    for same, run in itertools.groupby(rows, key=lambda row: row.kind == "kept"):
        shown = [_row(row) for row in run]
        if same and len(shown) > 2 * AROUND + 1:
            folded = "".join(shown[AROUND:-AROUND])
            middle = f"<details><summary>{len(shown) - 2 * AROUND} operators the same</summary>{folded}</details>"
            shown = [*shown[:AROUND], middle, *shown[-AROUND:]]
        out += shown
    return out


def _row(row: Row) -> str:
    return f'<div class="pair {row.kind}">{_side(row.old)}<i>{SIGNS[row.kind]}</i>{_side(row.new)}</div>'


def _side(line: Line | None) -> str:
    if line is None:
        return "<span></span>"
    where = f"{line.role} {line.module}".strip()
    return (
        f'<span title="{escape(where)}"><b>{escape(line.name)}</b> {escape(line.type)} {escape(line.expression)}</span>'
    )
