"""The page that `compare` and `demo` write: one file, no network, no script, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from graphrewrite.report.certificates import PROPERTIES
from graphrewrite.report.comparison import Comparison, RuleResult
from graphrewrite.report.page import page
from graphrewrite.report.svg import Series, line_chart, line_class

ABOUT_ALIGNMENT = (
    "Cosine between a block's gradient under the rule and its exact gradient at the same weights, on one batch of "
    "training samples: 1 is the direction of backpropagation, 0 is perpendicular to it."
)


def comparison_page(held: Comparison) -> str:
    """The page of a comparison. Every name that comes from the user's model is escaped."""
    title = f"{held.model}: {', '.join(r.rule for r in held.results)}"
    return page(
        title,
        f"<h1>{escape(held.model)}</h1>",
        f"<p>{escape(_setting(held))}</p>",
        "<h2>Results</h2>",
        _results(held),
        "<h2>What is proved about each graph</h2>",
        _certificates(held.results),
        "<h2>Accuracy</h2>",
        _accuracy(held),
        *_alignments(held),
        "<h2>Rules</h2>",
        _table(
            ["rule", "what it is", "formula"],
            [[_code(r.rule), escape(r.summary), _code(r.formula)] for r in held.results],
        ),
    )


def _setting(held: Comparison) -> str:
    budget = held.budget
    return (
        f"{held.parameters:,} parameters in {len(held.blocks)} blocks; {held.data}; {budget.epochs} epochs "
        f"in batches of {budget.batch}, Adam at {budget.rate:g} falling to zero, seed {budget.seed}; "
        f"torch {held.torch_version}, threads: {held.threads}; {held.seconds:.0f} s for everything."
    )


def _results(held: Comparison) -> str:
    reference = held.results[0]
    rows = [
        [
            _code(r.rule),
            f"{100 * r.accuracy:.2f} %",
            f"{100 * (r.accuracy - reference.accuracy):+.2f}",
            f"{r.step_ratio:.2f}",
            f"{1e3 * r.step_seconds:.2f} ms",
            f"{r.saved_bytes:,}",
            str(r.forward_passes),
        ]
        for r in held.results
    ]
    head = [
        "rule",
        f"accuracy ({held.judged_on})",
        "points to bp",
        "step time / bp",
        "step time",
        "saved bytes",
        "forward passes",
    ]
    return _table([escape(h) for h in head], rows, numbers=range(1, len(head)))


def _certificates(results: Sequence[RuleResult]) -> str:
    rows = [
        [_code(r.rule), *("yes" if r.certificates[p] else "no" for p in PROPERTIES), str(r.locality_radius)]
        for r in results
    ]
    return _table(["rule", *(p.replace("_", " ") for p in PROPERTIES), "locality radius"], rows)


def _accuracy(held: Comparison) -> str:
    series = [Series(r.rule, [(p.epoch, p.accuracy) for p in r.points]) for r in held.results]
    lowest = min(y for one in series for _, y in one.points)
    chart = line_chart(
        series,
        title="accuracy over training",
        x_label="epoch",
        y_range=(min(0.9, math.floor(10 * lowest) / 10), 1.0),
        percent=True,
    )
    return f"<figure>{chart}<figcaption>{_legend(r.rule for r in held.results)}</figcaption></figure>"


def _alignments(held: Comparison) -> list[str]:
    """A chart for each rule but backpropagation itself, which comes first."""
    others = held.results[1:]
    if not others:
        return []
    charts = "".join(_alignment(r, held.blocks) for r in others)
    head = ["<h2>Alignment with backpropagation</h2>", f"<p>{ABOUT_ALIGNMENT}</p>"]
    return [*head, f'<div class="charts">{charts}</div>']


def _alignment(result: RuleResult, blocks: Sequence[str]) -> str:
    names = [b for b in blocks if any(b in p.alignment for p in result.points)]
    series = [Series(b, [(p.epoch, p.alignment.get(b, math.nan)) for p in result.points]) for b in names]
    found = [y for one in series for _, y in one.points if not math.isnan(y)]
    lowest = min([0.0, *found])
    chart = line_chart(
        series,
        title=f"alignment of {result.rule} with backpropagation over training",
        x_label="epoch",
        y_range=(math.floor(5 * lowest) / 5, 1.0),
        size=(440, 260),
    )
    return f"<figure><strong>{_code(result.rule)}</strong>{chart}<figcaption>{_legend(names)}</figcaption></figure>"


def _legend(names: Iterable[str]) -> str:
    return "".join(f'<span class="key"><i class="{line_class(i)}"></i>{escape(n)}</span>' for i, n in enumerate(names))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: range = range(0)) -> str:
    """A table of cells that are HTML already."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(row))]
        return "<tr>" + "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, row, strict=True)) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{cells("th", head)}</thead><tbody>{body}</tbody></table></div>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
