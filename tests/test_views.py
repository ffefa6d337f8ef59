"""Graphs seen otherwise: before and after a pass, side by side, folded, as Model Explorer's JSON, over time."""

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
from cli_run import TARGETS, Run, run_fixture
from graphrewrite.cli.inspect import listing
from graphrewrite.cli.targets import load_target
from graphrewrite.graph.text import Line
from graphrewrite.report import explorer
from graphrewrite.report.fold import AIM, LARGE, Fold, default_depth, fold
from graphrewrite.report.graph import describe

run = run_fixture


class Tags(html.parser.HTMLParser):
    """Counts elements by class, and refuses addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.classes: dict[str, int] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        held = dict(attrs)
        assert not {"src", "href", "action", "onclick"} & set(held)
        assert tag not in ("script", "link", "img")
        for name in (held.get("class") or "").split():
            self.classes[name] = self.classes.get(name, 0) + 1


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_around_a_rule_is_the_diff_of_the_rules(run: Run, tmp_path: pathlib.Path) -> None:
    """A rule is a pass: the graph before it is that of backpropagation."""
    file = tmp_path / "diff.html"
    rules = run("diff", ":mlp", "--rule", "dfa", "--html", str(file), "--json").data
    _page_shows_both_sides(rules, file.read_text(encoding="utf-8"))
    around = run("diff", ":mlp", "--rule", "dfa", "--pass", "dfa", "--json").data
    assert (around["pass"], around["rules"]) == ("dfa", ["dfa", "dfa"])
    for kind in ("added", "rerouted"):
        assert around[kind] == rules[kind] == 2
    names = [[c["name"] for b in data["blocks"] for c in b["removed"]] for data in (rules, around)]
    # what nothing reads any more is pruned behind the rule, not by it
    assert set(names[1]) <= set(names[0]) == {"d_linear_1", "d_linear_2"}
    assert around["saved_bytes"] == rules["saved_bytes"]
    assert around["flops"] == rules["flops"]


def test_diff_around_a_schedule_says_what_moved(run: Run) -> None:
    data = run("diff", ":mlp", "--rule", "ff", "--pass", "early-local-backward", "--json").data
    moved = [change for block in data["blocks"] for change in block["moved"]]
    assert len(moved) == data["moved"] > 50
    assert {(c["was"][0], c["now"][0]) for c in moved} == {("default", "forward")}
    assert {block["name"] for block in data["blocks"] if block["moved"]} == {"0", "2"}
    assert data["flops"][0] == data["flops"][1]


def test_diff_prints_what_moved() -> None:
    from graphrewrite.cli.diff import text_of
    from graphrewrite.report.diff import BlockDiff, Change, Diff

    change = Change("moved", _line("a"), was=("default",), now=("forward",))
    shown = "\n".join(t.plain for t in text_of(Diff(("ff", "ff"), [BlockDiff("a", ("ff", "ff"), [change])], "p")))
    assert shown.startswith("before p -> after p\n0 removed, 0 rerouted, 0 added, 1 moved; ")
    assert "from the default to the forward stage" in shown


def test_diff_around_a_clean_up_keeps_who_stays(run: Run) -> None:
    data = run("diff", ":mlp", "--pass", "eliminate_common_subexpressions", "--json").data
    removed = [c["name"] for b in data["blocks"] for c in b["removed"]]
    assert data["added"] == 0
    assert data["flops"][0] == data["flops"][1]
    assert len(removed) == data["removed"]
    assert sum(b["kept"] for b in data["blocks"]) > 10


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--pass", "nope"], 1, "no pass 'nope' ran"),
        (["--pass", "bp:2"], 1, "bp ran 1 times"),
        (["--pass", "bp", "--against", "dfa"], 2, "graph before it"),
        (["--rule", "dfa", "--html", "/no/such/folder/x.html"], 1, "no folder"),
    ],
)
def test_diff_refuses_what_it_cannot_do(run: Run, words: list[str], code: int, told: str) -> None:
    outcome = run("diff", ":mlp", *words)
    assert outcome.code == code
    assert told in outcome.err


def _page_shows_both_sides(data: Any, text: str) -> None:
    classes = Tags(text).classes
    for kind in ("removed", "added", "rerouted"):
        assert classes[kind] == data[kind]
    kept = sum(block["kept"] for block in data["blocks"])
    assert classes["pair"] == kept + data["removed"] + data["added"] + data["rerouted"]
    # the same operator stands in one row of both sides
    row = re.search(r'<div class="pair rerouted">(.*?)</div>', text)
    assert row is not None
    assert row[1].count("<b>%d_relu</b>") == 2
    assert "prefers-color-scheme: dark" in text


def test_pages_escape_hostile_names(run: Run, tmp_path: pathlib.Path) -> None:
    files = [tmp_path / "diff.html", tmp_path / "memory.html"]
    assert run("diff", ":hostile", "--rule", "dfa", "--html", str(files[0])).code == 0
    assert run("memory", ":hostile", "--html", str(files[1])).code == 0
    for file in files:
        Tags(file.read_text(encoding="utf-8"))
        assert "&lt;script&gt;alert(1)&lt;/script&gt;[bold]" in file.read_text(encoding="utf-8")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_knows_when_values_are_born_and_die(run: Run, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "memory.html"
    data = run("memory", ":deep", "--html", str(file), "--json").data
    steps = run("schedule", ":deep", "--json").data["operators"]
    (group,) = [g for g in data["layers"] if len(g["layers"]) == 4]
    for value in group["values"]:
        assert len(value["born"]) == len(value["dies"]) == 4
        # later layers are computed later, and read again earlier
        assert value["born"] == sorted(value["born"])
        assert value["dies"] == sorted(value["dies"], reverse=True)
        for born, dies in zip(value["born"], value["dies"], strict=True):
            assert steps[born]["operator"] == value["operator"]
            assert steps[born]["phase"] == "forward"
            assert steps[dies]["phase"] == "backward"
    (relu,) = [v for v in group["values"] if v["operator"] == "relu"]
    assert [steps[i]["operator"] for i in relu["dies"]] == ["threshold_backward"] * 4
    assert [steps[i]["block"] for i in relu["born"]] == [f"layers.{i}" for i in range(4)]
    page = file.read_text(encoding="utf-8")
    assert f'<td class="number">{relu["born"][0]} .. {relu["born"][-1]}</td>' in page


def test_memory_draws_its_curve(run: Run, tmp_path: pathlib.Path) -> None:
    svg, page = tmp_path / "curve.svg", tmp_path / "curve.html"
    data = run("memory", ":mlp", "--measure", "--svg", str(svg), "--html", str(page), "--json").data
    space = "{http://www.w3.org/2000/svg}"
    root = ET.parse(svg).getroot()
    (curve,) = root.iter(f"{space}polygon")
    assert curve.find(f"{space}title").text == f"live bytes, peak {data['predicted_peak']:,}"
    assert f"measured peak {data['measured_peak']:,} B" in [t.text for t in root.iter(f"{space}text")]
    text = page.read_text(encoding="utf-8")
    assert Tags(text).classes["schedule"] == 1
    assert f"{data['predicted_peak']:,} bytes predicted, {data['measured_peak']:,} bytes measured" in text


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_folds_modules_below_a_depth(run: Run) -> None:
    graph = load_target(f"{TARGETS}:deep").compile("bp").graph("operator")
    nodes = describe(graph)["nodes"]
    whole, flat = ("\n".join(line.plain for line in listing(graph, depth)) for depth in (None, 0))
    folded = run("inspect", ":deep", "--depth", "1").out
    assert " …  " not in whole
    for block in range(4):
        inside = [n for n in nodes if n["module"].startswith(f"layers.{block}") and n["role"] == "forward"]
        assert f"  layers.{block}  bp\n    layers …  {len(inside)} operators: linear x2, add, relu, " in folded
    assert "%linear_8 " in folded
    assert "    … gradients of 16 more parameters" in folded
    assert "%linear_8 " not in flat
    assert "(all) …" in flat
    # without a depth, nothing of a small graph is left out
    assert all(f"%{n['name']} " in whole for n in nodes if n["target"] != "getitem")


def _line(module: str) -> Line:
    return Line("%x", "f32[]", "relu(%y)", "forward", module.partition(".")[0], module, "forward", None)  # type: ignore[arg-type]


def test_a_large_graph_is_folded_by_default() -> None:
    lines = [_line(f"h.{i // 100}.{'mlp' if i % 2 else 'attn'}.{i % 25}") for i in range(10_000)]
    depth = default_depth(lines)
    assert depth == 3
    shown = fold(lines, depth)
    assert len(shown) == 200 <= AIM
    assert sum(len(one.lines) for one in shown if isinstance(one, Fold)) == 10_000
    assert default_depth(lines[:LARGE]) is None
    assert fold(lines, None) == lines
    # where every module is wide, one line for all of them is still an overview
    assert default_depth([_line(f"a{i}.b") for i in range(LARGE + 1)]) == 0


def test_model_explorer_gets_every_node_in_its_module(run: Run, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "graph.json"
    data = run("inspect", ":deep", "--rule", "dfa", "--model-explorer", str(file), "--json").data
    graphs = {one["id"]: one["nodes"] for one in json.loads(file.read_text(encoding="utf-8"))}
    assert list(graphs) == ["forward", "operator", "aten"]
    for nodes in graphs.values():
        known = {node["id"] for node in nodes}
        assert len(known) == len(nodes)
        assert all(edge["sourceNodeId"] in known for node in nodes for edge in node["incomingEdges"])
        assert all(isinstance(attr["value"], str) for node in nodes for attr in node.get("attrs", []))
    held = {node["label"]: node for node in graphs["operator"] if node["namespace"] != "outputs"}
    for node in data["nodes"]:
        assert [e["sourceNodeId"] for e in held[node["name"]]["incomingEdges"]] == [str(i) for i in node["inputs"]]
    assert held["linear_2"]["namespace"] == "forward/layers.1/up"
    assert held["w_linear_2"]["namespace"] == "backward/layers.1/up"
    assert {"key": "derivative of", "value": "linear_2"} in held["w_linear_2"]["attrs"]
    assert sum(node["namespace"] == "outputs" for node in graphs["operator"]) == len(data["outputs"])


def test_sizes_are_printed_as_a_person_writes_them() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3, stride=2), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.head(y.permute(0, 2, 3, 1).reshape(-1, 2)), x.flatten(0, 1), x.repeat(3, 1, 1, 1)

    x = torch.randn(3, 1, 9, 11)
    made = gr.compile(Flat(), loss=lambda o, _: o[0].sum(), example_inputs=x, example_targets=torch.zeros(1))
    text = str(made.graph("operator"))
    types = dict(re.findall(r"%(\w+)\s+f32\[([^\]]*)\]", text))
    assert types["conv2d"] == "s0, 2, (s1 - 3)//2 + 1, (s2 - 3)//2 + 1"
    # what is too long to read is given as the example's number
    assert types["linear"] == "~60, 3"
    assert not re.search(r"FloorDiv|\d\*s\d", text)
    shapes = [n["type"]["shape"] for n in describe(made.graph("operator"))["nodes"] if n["name"] == "linear"]
    assert "//" in shapes[0][0]


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_of_diff_and_memory_open(run: Run, tmp_path: pathlib.Path, scheme: str) -> None:
    files = [tmp_path / "diff.html", tmp_path / "memory.html"]
    run("diff", ":deep", "--rule", "dfa", "--html", str(files[0]))
    run("memory", ":deep", "--measure", "--html", str(files[1]))
    with browser() as running:
        page = running.new_page(color_scheme=scheme)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(files[0].as_uri())
        rows = page.locator(".pair.rerouted:visible")
        assert rows.count() == 4
        page.locator("summary").first.click()
        assert page.locator("details").first.get_attribute("open") is None
        page.goto(files[1].as_uri())
        box = page.locator("svg.schedule polygon").bounding_box()
        assert box["height"] > 50
        back = "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 28)"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == back
        assert requests == [file.as_uri() for file in files]


@pytest.mark.browser
def test_a_graph_of_ten_thousand_nodes_opens_collapsed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    graph = gr.compile(model, example_inputs=torch.randn(6, 4), example_targets=torch.randint(0, 3, (6,))).graph()
    document = describe(graph)
    size = len(document["nodes"])
    nodes = [
        {
            **node,
            "id": node["id"] + size * i,
            "name": f"{node['name']}_{i}",
            "inputs": [source + size * i for source in node["inputs"]],
            "mirrors": None if node["mirrors"] is None else node["mirrors"] + size * i,
            "module": f"h.{i % 100}.{node['module']}",
        }
        for i in range(10_000 // size + 1)
        for node in document["nodes"]
    ]
    monkeypatch.setattr(explorer, "describe", lambda _: {**document, "nodes": nodes})
    file = tmp_path / "large.html"
    file.write_text(explorer.explorer_page("large", {"operator": graph}))
    with browser() as running:
        page = running.new_page()
        page.goto(file.as_uri())
        page.locator(".row.group").first.wait_for()
        assert page.locator("#found").inner_text() == f"{len(nodes)} nodes"
        assert page.locator(".row.node").count() == 0
        assert page.locator("#open").is_disabled()
        page.fill("#search", "linear_77")
        page.locator(".row.node").first.wait_for()
        shown = page.locator(".row.node")
        assert 0 < shown.count() <= 300
        shown.first.click()
        page.press("#search", "Enter")
        assert page.locator('.node[aria-current="true"]').count() == 1
