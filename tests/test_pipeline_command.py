"""`graphrewrite schedule --pipeline`: a simulated pipeline in every form."""

from __future__ import annotations

import json
import pathlib
import xml.etree.ElementTree as ET

from cli_run import Run, run_fixture

run = run_fixture


def test_command_simulates_a_pipeline(run: Run, tmp_path: pathlib.Path) -> None:
    files = [tmp_path / name for name in ("p.html", "p.svg", "p.json")]
    words = ["schedule", ":deep", "--pipeline", "ZBVZeroBubble", "--stages", "4", "--micro-batches", "6"]
    outcome = run(*words, "--html", str(files[0]), "--svg", str(files[1]), "--trace", str(files[2]))
    assert outcome.code == 0
    assert "2 processes, 6 micro-batches" in outcome.out
    text = files[0].read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in text
    bars = [g for g in ET.parse(files[1]).getroot().iter("{http://www.w3.org/2000/svg}g") if g.find("*[1]").text]
    data = run(*words, "--json").data["pipeline"]
    assert (
        len(bars)
        == len(data["actions"])
        == sum(2 if a["kind"] == "B" else 1 for a in data["actions"]) - sum(a["kind"] == "B" for a in data["actions"])
    )
    counts = {kind: sum(a["kind"] in (kind, "B") for a in data["actions"]) for kind in "IW"}
    assert counts == {"I": 24, "W": 24}
    spans = [e for e in json.loads(files[2].read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == len(data["actions"])
    assert 0 < data["bubble"] < 1
    busy = sum(a["end"] - a["start"] for a in data["actions"])
    assert abs(1 - busy / (2 * data["makespan"]) - data["bubble"]) < 1e-9
    assert [block for stage in data["stages"] for block in stage["blocks"]]


def test_local_rules_send_no_cotangent(run: Run) -> None:
    data = run("schedule", ":deep", "--pipeline", "ForwardOnly", "--stages", "2", "--json").data["pipeline"]
    assert data["messages"] == {"activations": 8, "cotangents": 0}


def test_timeline_of_a_backward_in_two_stages(run: Run) -> None:
    data = run("schedule", ":deep", "--split-backward", "--json").data
    phases = [one["phase"] for one in data["segments"]]
    assert "backward weight" in phases
    assert phases == sorted(phases, key=["forward", "backward", "backward weight"].index)


def test_bad_input_is_one_line(run: Run) -> None:
    for words in (
        ["--pipeline", "2F2B"],
        ["--pipeline", "1F1B", "--stages", "99"],
        ["--pipeline", "DualPipeV", "--stages", "3"],
    ):
        outcome = run("schedule", ":deep", *words)
        assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (1, "", 1), words
