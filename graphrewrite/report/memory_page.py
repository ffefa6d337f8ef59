"""The page that `graphrewrite memory --html` writes: the liveness curve and what is saved; no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from graphrewrite.graph.partition import Partition
from graphrewrite.report.memory import LayerGroup, lifetime, range_of
from graphrewrite.report.page import page
from graphrewrite.report.schedule import to_svg

ABOUT = "Born and dies: the operators that compute a value and read it last, numbered in the order in which they run."
HEADS = ("layer", "value of", "type", "kind", "born", "dies", "bytes in one layer", "bytes in all")


def memory_page(part: Partition, title: str, groups: Sequence[LayerGroup], peak: int, measured: int | None) -> str:
    """The page. Every name that comes from the user's model is escaped.

    Args:
        part: What runs.
        title: The heading.
        groups: What is saved, by layer.
        peak: The predicted peak of live bytes.
        measured: The measured one, if a step was run.
    """
    marks = {} if measured is None else {"measured peak": measured}
    peaks = f"{peak:,} bytes predicted" + ("" if measured is None else f", {measured:,} bytes measured")
    head = "".join(f"<th>{one}</th>" for one in HEADS)
    return page(
        title,
        f"<h1>{escape(title)}</h1>",
        f"<p>Peak of live bytes: {peaks}. Parameters, buffers and the batch are not counted.</p>",
        f"<figure>{to_svg(part, title, marks)}</figure>",
        f"<h2>Saved between forward and backward: {part.saved_bytes:,} bytes</h2>",
        f"<p>{ABOUT}</p>",
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{_rows(groups)}</tbody></table></div>',
    )


def _rows(groups: Sequence[LayerGroup]) -> str:
    rows = []
    for group in groups:
        for i, value in enumerate(group.values):
            source = f"{value.operator}, {value.module}" if value.module else value.operator
            names = [range_of(group.layers) if i == 0 else "", source, value.type, value.kind]
            numbers = [*lifetime(value), f"{value.nbytes:,}", f"{value.nbytes * len(group.layers):,}"]
            cells = "".join(f"<td>{escape(one)}</td>" for one in names)
            cells += "".join(f'<td class="number">{one}</td>' for one in numbers)
            rows.append(f"<tr>{cells}</tr>")
    return "".join(rows)
