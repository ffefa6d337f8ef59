"""The helpers for rule authors: they accept what is right, and notice what is wrong."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite import testing


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(6, 4).double(), torch.randint(0, 3, (6,))


def dfa_oracle(model, x, y, state):
    """delta_l = e B_l, written out."""
    h1 = torch.tanh(model[0](x))
    h2 = torch.tanh(model[2](h1))
    z = model[4](h2)
    e = (z.softmax(-1) - F.one_hot(y, 3)) / len(y)
    d2 = e @ state["dfa.feedback.2"] * (1 - h2**2)
    d1 = e @ state["dfa.feedback.0"] * (1 - h1**2)
    pairs = {"0": (d1, x), "2": (d2, h1), "4": (e, h2)}
    weights = {f"{n}.weight": d.T @ h for n, (d, h) in pairs.items()}
    return weights | {f"{n}.bias": d.sum(0) for n, (d, _) in pairs.items()}


def test_oracle_comparison_accepts_the_formula_and_nothing_else(problem):
    testing.assert_matches_oracle(problem[0], "dfa", *problem[1:], dfa_oracle)

    def wrong(*arguments):
        return {n: 1.001 * g for n, g in dfa_oracle(*arguments).items()}

    with pytest.raises(AssertionError, match=r"gradient of \d\.\w+: differs"):
        testing.assert_matches_oracle(problem[0], "dfa", *problem[1:], wrong)
    with pytest.raises(AssertionError, match="oracle tells"):
        testing.assert_matches_oracle(problem[0], "dfa", *problem[1:], lambda *_: {})


def test_helpers_leave_the_model_alone(problem):
    before = {n: p.detach().clone() for n, p in problem[0].named_parameters()}
    testing.rule_gradients(problem[0], "ff", *problem[1:])
    testing.downstream_reads(problem[0], "dfa", *problem[1:])
    testing.measure_memory(problem[0], "dfa", *problem[1:])
    for name, parameter in problem[0].named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_identity_check(problem):
    testing.assert_is_backpropagation(problem[0], "bp", *problem[1:])
    with pytest.raises(AssertionError, match="differs"):
        testing.assert_is_backpropagation(problem[0], "dfa", *problem[1:])


@pytest.mark.slow
def test_perturbation_finds_what_a_gradient_depends_on(problem):
    assert testing.downstream_reads(problem[0], "bp", *problem[1:]) == {"0": {"2", "4"}, "2": {"4"}, "4": set()}
    # the error reads every later block, and comes by no weight of theirs
    assert testing.downstream_reads(problem[0], "dfa", *problem[1:]) == {"0": {"2", "4"}, "2": {"4"}, "4": set()}
    assert testing.downstream_reads(problem[0], "ff", *problem[1:]) == {"0": set(), "2": set(), "4": set()}
    for rule in ("bp", "dfa", "ff"):
        testing.assert_locality_is_certified(problem[0], rule, *problem[1:])


def test_a_leak_that_the_certificate_misses_is_noticed(problem, monkeypatch):
    from graphrewrite.testing import rules

    monkeypatch.setattr(rules, "downstream_reads", lambda *_, **__: {"0": {"2"}})
    with pytest.raises(AssertionError, match="certified radius 0"):
        testing.assert_locality_is_certified(problem[0], "ff", *problem[1:])


def test_differences_agree_with_autograd(problem):
    model, x, y = problem
    numeric = testing.numeric_gradients(model, lambda m: F.cross_entropy(m(x), y))
    for name, gradient in testing.eager_gradients(model, x, y).items():
        assert torch.allclose(numeric[name], gradient, atol=1e-8)
    with pytest.raises(AssertionError, match="float64"):
        testing.numeric_gradients(nn.Linear(2, 2), lambda m: m.weight.sum())


def test_memory_is_predicted_and_measured(problem):
    memory = testing.measure_memory(problem[0], "bp", *problem[1:])
    assert 0 < memory.saved <= memory.predicted_peak
    # a measurement also sees the scratch space of torch's operators
    assert memory.predicted_peak <= memory.measured_peak <= 1.1 * memory.predicted_peak


def test_golden_graphs(problem, tmp_path: pathlib.Path, monkeypatch):
    graph = testing.compile_copy(problem[0], "dfa", *problem[1:]).graph()
    file = tmp_path / "golden" / "dfa.txt"
    with pytest.raises(AssertionError, match="GRAPHREWRITE_UPDATE_GOLDEN=1"):
        testing.assert_golden(graph, file)
    monkeypatch.setenv("GRAPHREWRITE_UPDATE_GOLDEN", "1")
    testing.assert_golden(graph, file)
    monkeypatch.delenv("GRAPHREWRITE_UPDATE_GOLDEN")
    testing.assert_golden(graph, file)
    other = testing.compile_copy(problem[0], "bp", *problem[1:]).graph()
    with pytest.raises(AssertionError, match="the graph is not that of"):
        testing.assert_golden(other, file)


def test_random_rules_are_compared_at_the_same_step(problem):
    @dataclass(frozen=True)
    class Same(gr.Rule):
        name = "same_of_this_test"

        def run(self, graph):
            return gr.PassResult(graph, False)

    assert testing.downstream_reads(problem[0], Same(), *problem[1:])["0"] == {"2", "4"}
