"""Reports: graphs as data, charts, pages, memory tables."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

import graphrewrite as gr
from graphrewrite.analysis.liveness import Curve
from graphrewrite.report.comparison import Comparison, RuleResult
from graphrewrite.report.diff import compare_compiled
from graphrewrite.report.graph import describe, operator_count
from graphrewrite.report.html import comparison_page
from graphrewrite.report.memory import by_layer, plot
from graphrewrite.report.summary import SavedRow
from graphrewrite.report.svg import Series, line_chart, ticks
from graphrewrite.testing import zoo
from graphrewrite.training import Budget, Point


def _result(rule: str, blocks: tuple[str, ...], cosine: float) -> RuleResult:
    points = tuple(Point(e, 0.5 + e / 10, 1.0, dict.fromkeys(blocks, cosine)) for e in (1, 2))
    properties = dict.fromkeys(("weight_transport", "backward_locked", "update_locked", "global_error"), True)
    return RuleResult(rule, "what <it> is", "δ < θ", 0.7, 1.5, 0.002, 1234, properties, 2, 1, points)


def _comparison(blocks: tuple[str, ...] = ("a", "b")) -> Comparison:
    results = (_result("bp", blocks, 1.0), _result("dfa{scale=2}", blocks, math.nan))
    return Comparison("a <model> & more", "data", "test set", 100, blocks, Budget(2), 3.0, "2.0", 1, results)


class _Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and collects text and addresses."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# --- pages and charts ------------------------------------------------------------------------------------------------


def test_page_is_one_file_without_script_or_network() -> None:
    text = comparison_page(_comparison())
    page = _Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 2


def test_page_escapes_every_name() -> None:
    hostile = '<script>alert("1")</script>&'
    held = _comparison((hostile, "b"))
    held = dataclasses.replace(
        held,
        model=hostile,
        data=hostile,
        judged_on=hostile,
        results=tuple(
            dataclasses.replace(r, rule=f"bp{hostile}", summary=hostile, formula=hostile) for r in held.results
        ),
    )
    text = comparison_page(held)
    page = _Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert hostile in page.texts
    labels = [shown for name, shown in page.attributes if name == "aria-label"]
    assert any(hostile in (label or "") for label in labels)


def test_page_shows_the_numbers() -> None:
    texts = _Page(comparison_page(_comparison())).texts
    for shown in ("70.00 %", "+0.00", "1.50", "2.00 ms", "1,234", "a <model> & more", "dfa{scale=2}", "δ < θ"):
        assert shown in texts, shown


def test_comparison_is_json_without_nan() -> None:
    data = json.loads(json.dumps(_comparison().to_json(), allow_nan=False))
    assert data["results"][1]["alignment"] == {"a": None, "b": None}
    assert data["results"][0]["points"][1] == {
        "epoch": 2,
        "accuracy": 0.7,
        "loss": 1.0,
        "alignment": {"a": 1.0, "b": 1.0},
    }
    assert data["budget"]["epochs"] == 2


def test_chart_places_points_on_its_axes() -> None:
    svg = line_chart([Series("a", [(0, 0.0), (10, 1.0)])], title="t", x_label="x", y_range=(0.0, 1.0))
    (line,) = [e for e in ET.fromstring(svg) if e.tag == "polyline"]
    (x0, y0), (x1, y1) = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    grid = sorted(float(e.attrib["y1"]) for e in ET.fromstring(svg) if e.tag == "line")
    assert x0 < x1
    assert (y0, y1) == (grid[-1], grid[0])


def test_chart_leaves_out_what_is_no_number_and_stays_inside() -> None:
    series = [Series(f"s{i}", [(1, math.nan), (2, 5.0), (3, -5.0)]) for i in range(10)]
    root = ET.fromstring(line_chart(series, title="t", x_label="x", y_range=(-1.0, 1.0)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    circles = [e for e in root if e.tag == "circle"]
    assert len(circles) == 20
    assert all(0 <= float(c.attrib["cx"]) <= width and 0 <= float(c.attrib["cy"]) <= height for c in circles)
    classes = [e.attrib["class"] for e in root if e.tag == "polyline"]
    assert len(set(classes)) == 10
    assert line_chart([], title="", x_label="", y_range=(0.0, 1.0)).startswith("<svg")


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 100.0, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]),
        (-0.4, 1.0, [0.0, 0.5, 1.0]),
        (0.9, 1.0, [0.9, 0.92, 0.94, 0.96, 0.98, 1.0]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, want: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(want)


# --- memory ----------------------------------------------------------------------------------------------------------


def _row(block: str, module: str, nbytes: int, kind: str = "activation") -> SavedRow:
    return SavedRow("n", module, block, "relu", "f32[s0, 4]", nbytes, kind)


def test_layers_that_save_the_same_are_merged() -> None:
    rows = [
        _row("head", "head", 8),
        _row("h.1", "h.1.act", 16),
        _row("h.0", "h.0.act", 16),
        _row("h.2@1", "h.2.act", 16),
        _row("h.3", "h.3.act", 24),
        _row("h.0", "h.0", 0, "input"),
    ]
    groups = by_layer(rows, ["h.0", "h.1", "h.2@1", "h.3", "head"])
    assert [g.layers for g in groups] == [("h.0", "h.1", "h.2@1"), ("h.3",), ("head",)]
    assert [g.nbytes for g in groups] == [48, 24, 8]
    assert groups[0].values[0].module == "act"
    assert groups[2].values[0].module == ""


def test_plot_keeps_peaks_when_it_is_squeezed() -> None:
    live = [0] * 500
    live[333] = 80
    live[100] = 40
    rows, starts = plot([Curve([], live[:250]), Curve([], live[250:])], width=50, height=4)
    assert [len(row) for row in rows] == [50] * 4
    assert starts == [0, 25]
    assert rows[0].index("█") == 333 * 50 // 500
    assert rows[0].count("█") == 1
    assert [row.count("█") for row in rows] == [1, 1, 2, 2]
    assert plot([Curve([], [])]) == ([], [])


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_any_graph_is_plain_data() -> None:
    case = zoo.make("cnn")
    x, y = case.batch(4)
    compiled = gr.compile(case.model, example_inputs=x, example_targets=y, blocks="layers")
    for level in ("operator", "aten"):
        graph = compiled.graph(level)
        data = json.loads(json.dumps(describe(graph), allow_nan=False))
        assert len(data["nodes"]) == len(list(graph.nodes)) - 1
        calls = [n for n in data["nodes"] if n["op"] == "call" and n["target"] != "getitem"]
        assert len(calls) == operator_count(graph)
        forward = {n["id"] for n in data["nodes"] if n["role"] in ("forward", "loss", "input")}
        mirrors = {n["mirrors"] for n in data["nodes"]} - {None}
        assert mirrors <= forward
        assert mirrors
        assert len(data["outputs"]) == len(graph.outputs)


def test_diff_finds_every_operator_again_in_another_capture() -> None:
    case = zoo.make("gpt")
    x, y = case.batch(4)
    bp, dfa = (gr.compile(case.model, rule, example_inputs=x, example_targets=y) for rule in ("bp", "dfa"))
    changes = [change for block in compare_compiled(bp, dfa).blocks for change in block.changes]
    assert changes
    # a rule that redirects cotangents leaves the forward alone
    assert all(change.backward for change in changes)
    assert {change.line.role for change in changes if change.kind == "added"} <= {"signal", "cotangent"}
