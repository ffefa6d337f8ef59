"""`graphrewrite schedule`: what runs when, and what is alive."""

from __future__ import annotations

import json
import pathlib
import xml.etree.ElementTree as ET

import pytest

import graphrewrite as gr
from browser import browser
from cli_run import Run, run_fixture
from graphrewrite.analysis.liveness import backward_curve, forward_curve
from graphrewrite.graph.nodes import info, is_getitem
from graphrewrite.report.schedule import PHASES, segments, timeline, to_svg, to_trace
from targets import deep

run = run_fixture


def partition(rule: str):
    model, x, y = deep()
    return gr.compile(model, rule, example_inputs=x, example_targets=y).program().partition


def test_backpropagation_runs_all_forward_then_all_backward() -> None:
    part = partition("bp")
    steps = timeline(part)
    phases = [step.phase for step in steps]
    assert phases == sorted(phases, key=PHASES.index)
    assert set(phases) == {"forward", "backward"}
    blocks = [one.block for one in segments(steps) if one.phase == "backward"]
    assert blocks == ["loss", "head", "layers.3", "layers.2", "layers.1", "layers.0"]
    assert max(s.live for s in steps) == max(forward_curve(part).peak, backward_curve(part).peak)


def test_local_blocks_learn_right_behind_their_forward() -> None:
    found = segments(timeline(partition("ff")))
    early = [one for one in found if one.phase == "early local backward"]
    assert {one.block for one in early} == {f"layers.{i}" for i in range(4)}
    where = {(one.phase, one.block): one.start for one in found}
    for i in range(3):
        assert where["early local backward", f"layers.{i}"] < where["forward", f"layers.{i + 1}"]


@pytest.mark.parametrize("rule", ["bp", "dfa", "ff"])
def test_segments_hold_every_operator_once(rule: str) -> None:
    part = partition(rule)
    steps = timeline(part)
    nodes = [n for order in part.order.values() for n in order if not is_getitem(n)]
    assert [step.node for step in steps] == nodes
    at = 0
    for one in segments(steps):
        assert one.start == at
        at += len(one.steps)
        assert {info(s.node).block for s in one.steps} == {one.block}
    assert at == len(steps)


def test_trace_is_what_perfetto_reads() -> None:
    part = partition("ff")
    trace = json.loads(json.dumps(to_trace(part, "a model")))
    events = trace["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C"}
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(lanes.values()) == ["forward", "early local backward", "backward"]
    spans = [e for e in events if e["ph"] == "X" and e["cat"] != "block"]
    assert [e["ts"] for e in spans] == list(range(len(timeline(part))))
    assert all(lanes[e["tid"]] == e["cat"] for e in spans)
    counters = [e["args"]["bytes"] for e in events if e["ph"] == "C"]
    assert counters == [step.live for step in timeline(part)]
    # on one thread, spans nest or follow one another
    for tid in lanes:
        ends: list[int] = []
        for event in (e for e in events if e["ph"] == "X" and e["tid"] == tid):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1]
            ends.append(event["ts"] + event["dur"])


def test_drawing_has_a_bar_for_each_segment() -> None:
    part = partition("ff")
    root = ET.fromstring(to_svg(part, "a <model>"))
    bars = root.findall("{http://www.w3.org/2000/svg}g")
    assert len(bars) == len(segments(timeline(part)))
    assert root.attrib["aria-label"] == "a <model>"


def test_command_writes_every_form(run: Run, tmp_path: pathlib.Path) -> None:
    files = [tmp_path / name for name in ("s.html", "s.svg", "s.json")]
    words = ["--html", str(files[0]), "--svg", str(files[1]), "--trace", str(files[2])]
    outcome = run("schedule", ":deep", "--rule", "mono_forward", *words)
    assert outcome.code == 0
    assert "early local backward" in outcome.out
    assert "peak of live bytes" in outcome.out
    text = files[0].read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in text
    ET.parse(files[1])
    assert json.loads(files[2].read_text())["traceEvents"]
    data = run("schedule", ":deep", "--rule", "mono_forward", "--json").data
    assert sum(s["operators"] for s in data["segments"]) == data["steps"] == len(data["operators"])
    memory = run("memory", ":deep", "--rule", "mono_forward", "--json").data
    assert data["peak_bytes"] == memory["predicted_peak"]
    assert data["saved_bytes"] == memory["saved_bytes"]


def test_hostile_names_are_escaped(run: Run, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "s.html"
    assert run("schedule", ":hostile", "--html", str(file)).code == 0
    assert "<script" not in file.read_text()


def test_bad_input_is_one_line(run: Run, tmp_path: pathlib.Path) -> None:
    for words in (["schedule", ":raising"], ["schedule", ":mlp", "--trace", str(tmp_path)]):
        outcome = run(*words)
        assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (1, "", 1)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_without_network(run: Run, tmp_path: pathlib.Path, scheme: str) -> None:
    file = tmp_path / "s.html"
    assert run("schedule", ":deep", "--rule", "ff", "--html", str(file)).code == 0
    with browser() as running:
        page = running.new_page(color_scheme=scheme)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        box = page.locator("svg.schedule").bounding_box()
        assert box["width"] > 600
        back = page.evaluate("getComputedStyle(document.querySelector('svg .back')).fill")
        assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 28)")
        assert requests == [file.as_uri()]


def test_timeline_of_a_program_without_a_loss() -> None:
    model, x, _ = deep()
    part = gr.compile(model, "bp", example_inputs=x).program().partition
    assert {step.phase for step in timeline(part)} == {"forward", "backward"}
