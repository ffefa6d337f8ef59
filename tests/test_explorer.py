"""The interactive page, drawings and stages of a graph."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch
from torch import nn

import graphrewrite as gr
from browser import browser
from cli_run import Run, run_fixture
from graphrewrite.graph.interpret import interpret
from graphrewrite.graph.nodes import Grad, Stored
from graphrewrite.graph.stages import stage_graph
from graphrewrite.report.drawing import boxes_of, to_dot, to_svg
from graphrewrite.report.explorer import explorer_page
from graphrewrite.report.graph import describe

run = run_fixture


def compiled(rule: str = "dfa") -> gr.CompiledModule:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    return gr.compile(model, rule, example_inputs=torch.randn(6, 4), example_targets=torch.randint(0, 3, (6,)))


class Page(html.parser.HTMLParser):
    """Collects the elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self.addresses: list[str] = []
        self.policy = ""
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        held = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in held.items() if k in ("src", "href", "action")]
        if tag == "meta" and held.get("http-equiv") == "Content-Security-Policy":
            self.policy = held["content"]
        self._script = held.get("id", "code") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


# --- the page, unopened ----------------------------------------------------------------------------------------------


def test_page_holds_its_graphs_and_loads_nothing(run: Run, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "graph.html"
    assert run("inspect", ":mlp", "--rule", "dfa", "--html", str(file)).code == 0
    text = file.read_text()
    page = Page(text)
    assert page.addresses == []
    assert page.policy.startswith("default-src 'none'")
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert "prefers-color-scheme: dark" in text
    assert set(page.scripts) == {"code", "graph-forward", "graph-operator", "graph-aten"}
    shown = run("inspect", ":mlp", "--rule", "dfa", "--json").data
    held = json.loads(page.scripts["graph-operator"])
    assert held["nodes"] == shown["nodes"]
    assert {"cotangent", "signal"} & {n["role"] for n in json.loads(page.scripts["graph-forward"])["nodes"]} == set()


def test_hostile_names_stay_data(run: Run, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "graph.html"
    assert run("inspect", ":hostile", "--html", str(file)).code == 0
    page = Page(file.read_text())
    assert page.tags.count("script") == 4
    names = {n["module"] for n in json.loads(page.scripts["graph-operator"])["nodes"]}
    assert "<script>alert(1)</script>[bold]" in names


def test_notebooks_show_pages() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert gr.compile(module)._repr_html_().startswith("<pre>CompiledModule(")
    made = compiled()
    for shown in (made._repr_html_(), made.graph("operator")._repr_html_()):
        assert shown.startswith('<iframe sandbox="allow-scripts"')
        assert "graph-operator" in shown
        assert "<script" not in shown


# --- drawings --------------------------------------------------------------------------------------------------------


def test_drawings_of_a_small_graph_have_a_box_for_each_operator(run: Run, tmp_path: pathlib.Path) -> None:
    svg, dot = tmp_path / "graph.svg", tmp_path / "graph.dot"
    assert run("inspect", ":mlp", "--svg", str(svg), "--dot", str(dot)).code == 0
    nodes = run("inspect", ":mlp", "--json").data["nodes"]
    wanted = [n["name"] for n in nodes if n["op"] == "call" or n["target"].startswith(("input", "target"))]
    titles = [t.text for t in ET.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}title")]
    assert titles == wanted
    text = dot.read_text()
    assert len(re.findall(r"label=", text)) == len(wanted)
    assert text.startswith('digraph "operator" {')


def test_boxes_do_not_overlap_and_arrows_point_down() -> None:
    root = ET.fromstring(to_svg(describe(compiled().graph("operator"))))
    spots = [
        (float(r.attrib["x"]), float(r.attrib["y"]))
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
        if "x" in r.attrib
    ]
    for i, (x, y) in enumerate(spots):
        for a, b in spots[:i]:
            assert abs(x - a) >= 150 or abs(y - b) >= 34
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
        if len(numbers) == 8:
            assert numbers[7] > numbers[1]


def test_a_large_graph_is_drawn_by_block() -> None:
    document = describe(compiled().graph("aten"))
    boxes = boxes_of(document, small=5)
    assert {(b.kind, b.name) for b in boxes if b.kind != "input"} == {
        (kind, name) for kind in ("forward", "backward") for name in ("0", "2", "4", "loss")
    }
    assert sum(b.members for b in boxes if b.kind != "input") == sum(n["op"] == "call" for n in document["nodes"])
    assert all(i not in box.reads for i, box in enumerate(boxes))


def test_dot_quotes_names() -> None:
    document = describe(compiled().graph("operator"))
    document["nodes"][-1]["name"] = 'quo"te'
    assert '"quo\\"te' in to_dot(document)


def test_a_file_that_cannot_be_written_is_found_out_first(run: Run, tmp_path: pathlib.Path) -> None:
    for option in ("--html", "--svg", "--dot"):
        for place in (tmp_path, tmp_path / "no" / "file"):
            outcome = run("inspect", ":raising", option, str(place))
            assert outcome.code == 1
            assert outcome.err.startswith(f"error: cannot write {place}")
            assert len(outcome.err.splitlines()) == 1


# --- stages ----------------------------------------------------------------------------------------------------------


def test_the_forward_graph_stays_what_was_captured() -> None:
    made = compiled()
    forward = made.graph("forward")
    assert forward.level == "forward"
    assert not forward.backward_nodes()
    assert made.graph("operator").backward_nodes()


@pytest.mark.parametrize("rule", ["bp", "dfa", "ff"])
def test_stages_run_as_the_program_does(rule: str) -> None:
    made = compiled(rule)
    part = made.program().partition
    forward, backward = stage_graph(part, "forward"), made.graph("backward")
    assert len(forward.outputs) == len(part.forward_outputs) + len(part.saved)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    state = {name: held.detach().clone() for name, held in made.rule_state.items()}
    made.loss(x, y).backward()
    expected = {n: p.grad for n, p in made.module.named_parameters()}
    call_leaves = {"input": x, "y": y}

    def fetch(spec: Any) -> Any:
        name = getattr(spec, "path", None)
        if name in call_leaves:
            return call_leaves[name]
        if type(spec).__name__ == "Counter":
            return torch.tensor([0, 0, 0])
        return {**dict(made.module.named_parameters()), **state}[spec.name].detach()

    values = interpret(forward, [fetch(spec) for spec in forward.inputs])
    saved = values[len(part.forward_outputs) :]
    given = [*saved, *[torch.ones(()) for _ in part.tangents]]
    assert len(given) == len(backward.inputs)
    results = dict(zip(backward.outputs, interpret(backward, given), strict=True))
    for spec, held in results.items():
        if isinstance(spec, Grad) and spec.of.name in expected:
            assert torch.equal(held, expected[spec.of.name])
    stored = [spec for spec in backward.inputs if isinstance(spec, Stored)]
    assert len(stored) == sum(not one.is_input for one in part.saved)


def test_a_stage_that_is_not_there_is_refused(run: Run) -> None:
    outcome = run("inspect", ":mlp", "--level", "backward_weight")
    assert outcome.code == 1
    assert "no backward_weight stage" in outcome.err
    data = run("inspect", ":mlp", "--level", "backward", "--json").data
    assert {n["op"] for n in data["nodes"]} == {"input", "call"}
    assert any(n["target"].startswith("saved ") for n in data["nodes"])
    with pytest.raises(gr.GraphRewriteError, match="unknown"):
        compiled().graph("nope")


def test_a_mirror_is_found_inside_its_stage() -> None:
    for level, kind in (("operator", "call"), ("aten", "call"), ("backward", "input")):
        nodes = describe(compiled().graph(level))["nodes"]
        (one,) = [n for n in nodes if n["name"] in ("d_relu_1", "threshold_backward")]
        mirror = nodes[one["mirrors"]]
        assert (mirror["name"], mirror["op"]) == ("relu_1", kind)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_search_collapse_and_click_through(tmp_path: pathlib.Path, scheme: str) -> None:
    made = compiled()
    file = tmp_path / "graph.html"
    graphs = {level: made.graph(level) for level in ("forward", "operator", "aten")}
    file.write_text(explorer_page("a model", graphs, level="operator"))
    with browser() as running:
        page = running.new_page(color_scheme=scheme)
        problems: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector(".row.node")
        # click through: a VJP node to its mirror
        page.locator(".node .name").get_by_text("%d_relu", exact=True).click()
        assert page.locator("#details h2").inner_text() == "%d_relu"
        assert "made by" in page.locator("#details dl").inner_text()
        page.locator("#details .link").get_by_text("%relu", exact=True).first.click()
        assert page.locator("#details h2").inner_text() == "%relu"
        assert page.locator('.node[aria-current="true"] .name').inner_text() == "%relu"
        # search, and jump out of the results into the tree
        page.fill("#search", "signal")
        page.locator(".row.group").first.wait_for(state="detached")
        rows = page.locator(".row.node")
        assert rows.count() == sum(n["role"] == "signal" for n in describe(graphs["operator"])["nodes"])
        page.press("#search", "Enter")
        assert page.locator("#search").input_value() == ""
        assert page.locator('.node[aria-current="true"] .role').inner_text() == "signal"
        # collapse and expand
        page.click("#close")
        assert page.locator(".row.node:visible").count() == 0
        page.locator(".row.group", has_text="backward").first.click()
        page.locator(".row.group:visible", has_text="2").last.click()
        assert page.locator(".row.node:visible").count() > 0
        page.click("#open")
        assert page.locator(".row.node:visible").count() == len(describe(graphs["operator"])["nodes"])
        # another level
        page.click('.tab[data-level="aten"]')
        assert "threshold_backward" in page.locator("#tree").inner_text()
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 28)")
        assert problems == []
        assert requests == [file.as_uri()]


@pytest.mark.browser
def test_a_page_in_a_notebook_frame_works(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "notebook.html"
    file.write_text(f"<!doctype html><body>{compiled()._repr_html_()}</body>")
    with browser() as running:
        page = running.new_page()
        page.goto(file.as_uri())
        inside = page.frame_locator("iframe")
        inside.locator(".row.node").first.wait_for()
        inside.locator(".node .name").get_by_text("%linear_1", exact=True).click()
        assert inside.locator("#details h2").inner_text() == "%linear_1"
