"""`graphrewrite compare` and `demo`: training under several rules side by side."""

from __future__ import annotations

import pathlib

import pytest
import torch

from cli_run import Run, run_fixture

run = run_fixture

FAST = ("--epochs", "1", "--batch", "20", "--rate", "0.02", "--threads", "1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare", ":untaught"], "gives no targets"),
        (["compare", ":mlp", "--rules", "bp,nope"], "no rule is named 'nope'"),
        (["compare", ":tokens", "--dataset", "digits"], "1 x 8 x 8"),
        (["compare", ":regression", "--rules", "bp", "--loss", ":square_loss"], "integer class"),
        (["compare", "--data", "/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(run: Run, words: list[str], told: str) -> None:
    outcome = run(*words)
    assert outcome.code == 1
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_an_unwritable_page_is_found_out_before_training(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphrewrite import training

    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("it trained first"))
    for place in (tmp_path / "no" / "page.html", tmp_path):
        outcome = run("compare", ":separable", "--html", str(place))
        assert outcome.code == 1
        assert f"cannot write {place}" in outcome.err


def test_compare_trains_a_target_under_several_rules(run: Run) -> None:
    data = run("compare", ":separable", "--rules", "dfa", *FAST, "--epochs", "6", "--json").data
    results = {one["rule"]: one for one in data["results"]}
    assert list(results) == ["bp", "dfa"]
    assert data["judged_on"] == "held-out fifth"
    assert results["bp"]["step_ratio"] == 1.0
    assert results["bp"]["accuracy"] >= 0.95
    assert results["dfa"]["accuracy"] >= 0.95
    assert all(one == pytest.approx(1.0, abs=1e-5) for one in results["bp"]["alignment"].values())
    assert results["dfa"]["alignment"]["4"] == pytest.approx(1.0, abs=1e-5)
    assert results["dfa"]["alignment"]["0"] < 0.999
    assert [point["epoch"] for point in results["dfa"]["points"]] == list(range(1, 7))
    assert [results[r]["certificates"]["weight_transport"] for r in results] == [True, False]


def test_compare_prints_what_its_json_holds(run: Run) -> None:
    words = ["compare", ":separable", "--rules", "bp,dfa", *FAST, "--epochs", "4"]
    data, text = run(*words, "--json").data, run(*words).out
    lines = {line.split()[0]: line.split() for line in text.split("proved on")[0].splitlines()[2:] if line}
    for result in data["results"]:
        assert lines[result["rule"]][1] == f"{100 * result['accuracy']:.2f}"
    cosines = text.split("at the end\n")[1].splitlines()
    assert cosines[0].split() == ["rule", *data["blocks"]]
    shown = [f"{data['results'][1]['alignment'][block]:+.3f}" for block in data["blocks"]]
    assert cosines[2].split() == ["dfa", *shown]


def test_compare_leaves_out_rules_nobody_asked_for_that_do_not_fit(run: Run) -> None:
    outcome = run("compare", ":tokens", *FAST, "--json")
    assert [one["rule"] for one in outcome.data["results"]] == ["bp", "dfa"]
    assert outcome.err.startswith("ff{threshold=0.3} is left out: ")
    assert run("compare", ":tokens", "--epochs", "1", "--rules", "ff").code == 1


def test_compare_prints_and_writes_hostile_names_as_they_are(run: Run, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.html"
    outcome = run("compare", ":hostile", "--rules", "bp,dfa", *FAST, "--html", str(page))
    assert outcome.code == 0
    assert "<script>alert(1)</script>[bold]" in outcome.out
    written = page.read_text(encoding="utf-8")
    assert "<script" not in written
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[bold]" in written
    assert "&amp;amp;" in written


def test_compare_reads_mnist_from_a_folder(run: Run, data_folder: pathlib.Path) -> None:
    words = ["compare", "--data", str(data_folder), "--rules", "bp", *FAST, "--batch", "500", "--json"]
    data = run(*words).data
    assert data["data"] == "mnist, 60000 training and 10000 test samples"
    assert data["results"][0]["accuracy"] > 0.9


def test_demo_ends_with_dfa_and_ff_within_three_points_of_bp(run: Run, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "demo.html"
    threads = torch.get_num_threads()
    data = run("demo", "--epochs", "60", "--html", str(page), "--json").data
    assert torch.get_num_threads() == threads
    bp, dfa, ff = data["results"]
    assert bp["accuracy"] > 0.96
    assert dfa["accuracy"] > bp["accuracy"] - 0.03
    assert ff["accuracy"] > bp["accuracy"] - 0.03
    assert [r["certificates"]["update_locked"] for r in data["results"]] == [True, True, False]
    assert (bp["rule"], dfa["rule"], ff["rule"]) == ("bp", "dfa", "ff{threshold=0.3}")
    assert page.read_text(encoding="utf-8").count("<svg") == 3
