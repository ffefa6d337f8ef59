"""`graphrewrite explain`, and observers of a compilation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import graphrewrite as gr
from cli_run import Run, run_fixture
from graphrewrite.graph.nodes import info
from graphrewrite.observe import Observer, observing
from graphrewrite.pipeline import build_pass
from graphrewrite.report.explain import Explainer
from helpers import clean_graph

run = run_fixture


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 4), torch.randint(0, 3, (6,))


def stories(model: nn.Module, rule: str = "bp", x: torch.Tensor | None = None, **options):
    own_x, y = batch()
    explainer = Explainer()
    with observing(explainer):
        gr.compile(model, rule, **options).materialize(own_x if x is None else x, y)
    return {story.name: story for story in explainer.stories}


def test_what_dfa_does_to_each_block(run: Run) -> None:
    data = run("explain", ":mlp", "--rule", "dfa", "--json").data
    dfa = data["passes"][0]
    assert dfa["name"] == "dfa"
    assert dfa["modified"]
    told = {(f["kind"], f["node"]) for f in dfa["fired"]}
    assert ("added", "dfa.feedback.0") in told
    assert {("removed", "d_linear_1"), ("removed", "d_linear_2")} <= told
    rerouted = {f["node"]: f["text"] for f in dfa["fired"] if f["kind"] == "rerouted"}
    assert rerouted["d_relu"] == "reads %mm instead of %d_linear_1"
    # the weight gradients are the same nodes, made again: they read the same names as before
    assert not [f for f in dfa["fired"] if f["node"].startswith("w_")]


def test_backpropagation_says_that_it_left_each_block(run: Run) -> None:
    story = run("explain", ":mlp", "--json").data["passes"][0]
    assert story["fired"] == []
    assert [one["block"] for one in story["declined"]] == ["0", "2", "4"]


def test_a_pass_can_be_selected_and_must_have_run(run: Run) -> None:
    data = run("explain", ":mlp", "--pass", "fold-views", "--pass", "bp", "--json").data
    assert [story["name"] for story in data["passes"]] == ["bp", "fold_views"]
    outcome = run("explain", ":mlp", "--pass", "nope")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: no pass 'nope' ran on this target; remedy: these did: bp, fold_views, ")


def test_text_tells_every_pass_and_where_there_was_no_candidate(run: Run) -> None:
    outcome = run("explain", ":mlp", "--rule", "ff")
    assert outcome.code == 0
    assert "- %detach" in outcome.out
    assert "no candidate in this graph" in outcome.out
    assert "the gradient of parameter 4.weight depends on the task loss" in outcome.out
    assert "more moved" in outcome.out
    full = run("explain", ":mlp", "--rule", "ff", "--full").out
    assert "more moved" not in full
    assert len(full.splitlines()) > len(outcome.out.splitlines())


def test_counts_agree_with_the_history() -> None:
    x, y = batch()
    explainer = Explainer()
    with observing(explainer):
        compiled = gr.compile(mlp(), "ff").materialize(x, y)
    history = [r for r in compiled.report().passes if r.text != "expand"]
    assert [(s.text, s.nodes, s.modified) for s in explainer.stories] == [
        (r.text, (r.nodes_before, r.nodes_after), r.modified) for r in history
    ]
    assert all(bool(s.fired) <= s.modified for s in explainer.stories)


def test_early_backward_tells_each_gradient_it_cannot_move() -> None:
    story = stories(mlp(), "ff")["early_local_backward"]
    assert {one.kind for one in story.fired} == {"added", "rerouted", "moved"}
    assert len([one for one in story.declined if "depends on the task loss" in one.reason]) == 2
    assert {one.block for one in story.declined} == {"4"}


def test_equal_operators_of_two_blocks_are_told() -> None:
    story = stories(mlp(), "ff")["eliminate_common_subexpressions"]
    apart = [one for one in story.declined if "blocks stay independent" in one.reason]
    assert apart
    for one in apart:
        # the names are those of the printed graph
        assert one.node in {f.node for f in story.fired} or "%" in one.reason


def test_statistics_of_an_evaluated_normalisation_are_needed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 16, 3))
    x = torch.randn(6, 1, 6, 6)
    fired = stories(model, x=x)["drop_unread_statistics"]
    assert len(fired.fired) == 1
    assert not fired.declined
    model[1].eval()
    declined = stories(model, x=x)["drop_unread_statistics"]
    assert not declined.fired
    assert ["evaluation mode" in one.reason for one in declined.declined] == [True]


def test_the_first_convolution_has_one_half_only() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    story = stories(model, x=torch.randn(6, 1, 6, 6))["merge_convolution_backward"]
    assert story.modified
    assert [one.block for one in story.declined] == ["0"]


def test_unread_random_operators_are_told() -> None:
    graph = clean_graph(mlp(), *batch())
    first = graph.forward_nodes()[0]
    noise = graph.emit(torch.ops.aten.rand_like.default, (first,), like=info(first))
    graph.sort()
    assert not build_pass("eliminate_dead_code").run(graph).modified
    assert [(by, name) for by, name, _ in graph.log.entries] == [("eliminate_dead_code", noise.name)]


def test_reasons_name_nodes_as_they_are_printed() -> None:
    @dataclass(frozen=True)
    class Picky(gr.Pass):
        name = "picky"

        def run(self, graph):
            first, *_ = [n for n in graph.forward_nodes() if info(n).module == "2"]
            self.fail(graph, f"not %{first.name} and not %nobody", first)
            self.fail(graph, "nothing at all")
            return gr.PassResult(graph, False)

    story = stories(mlp(), passes=[Picky()])["picky"]
    assert [(one.node, one.block, one.reason) for one in story.declined] == [
        ("linear_1", "2", "not %linear_1 and not %nobody"),
        ("", "", "nothing at all"),
    ]


def test_an_observer_sees_stages_passes_and_the_program_in_order() -> None:
    class Recorder(Observer):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def begin(self, kind):
            self.seen.append(f"begin {kind}")

        def stage(self, name, graph):
            self.seen.append(name)

        def passed(self, event):
            assert event.before is None
            self.seen.append(event.ran.name)

        def finish(self, program):
            self.seen.append("finish")

    recorder = Recorder()
    compiled = gr.compile(mlp(), "ff", verify="off")
    x, y = batch()
    with observing(recorder):
        compiled.materialize(x, y)
    compiled.eval().predict(x)
    assert recorder.seen[:5] == ["begin loss", "capture", "differentiate", "ff", "expand"]
    assert recorder.seen[-2:] == ["early_local_backward", "finish"]


@pytest.mark.parametrize("words", [["explain", ":raising"], ["explain", ":mlp", "--rule", "nope"]])
def test_bad_input_is_one_line(run: Run, words: list[str]) -> None:
    outcome = run(*words)
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (1, "", 1)
