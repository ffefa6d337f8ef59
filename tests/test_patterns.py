"""Patterns: what they match, what they decline, and how they rewrite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.graph.nodes import info
from graphrewrite.graph.verify import verify
from graphrewrite.patterns import Match, PatternPass, fail, match, op, var
from helpers import assert_equal, clean_graph, grads_of
from helpers import run as results_of

aten = torch.ops.aten


class Net(nn.Module):
    """Negations: twice in a row, once, and twice with the inner one read by another."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.neg(torch.neg(self.low(x)))
        inner = -torch.tanh(h)
        return self.high(-inner * inner)


def graph():
    model, x, y = Net(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    return model, x, y, clean_graph(model, x, y, blocks="auto")


@dataclass(frozen=True)
class FoldDoubleNegation(PatternPass):
    name = "fold_double_negation"
    level = "aten"
    preserves_numerics = True
    pattern = op(aten.neg.default, op(aten.neg.default, var("x"), name="inner"))

    def check(self, graph, match):
        if len(match["inner"].users) > 1:
            return fail("the inner negation has other readers", match["inner"])
        return None

    def rewrite(self, graph, match):
        return match["x"]


def negations(graph, role="forward"):
    return [n for n in graph.nodes if n.target is aten.neg.default and info(n).role == role]


def test_fires_where_it_may_and_says_where_not():
    model, x, y, made = graph()
    assert len(negations(made)) == 4
    before = grads_of(results_of(made, model, x, y))
    blamed = negations(made)[2].name
    result = FoldDoubleNegation().run(made)
    assert result.modified
    verify(made)
    left = negations(made)
    assert len(left) == 3  # the outer one of the first pair is gone; the inner one is dead, the others stay
    assert ("fold_double_negation", blamed, "the inner negation has other readers") in made.log.entries
    assert_equal(grads_of(results_of(made, model, x, y)), before)
    made.prune()
    assert len(negations(made)) == 2


def test_is_idempotent():
    *_, made = graph()
    FoldDoubleNegation().run(made)
    made.prune()
    assert not FoldDoubleNegation().run(made).modified


def test_through_compile_with_numeric_verification():
    model, x, y, _ = graph()
    compiled = gr.compile(model, passes=[FoldDoubleNegation()], verify="numeric", example_inputs=x, example_targets=y)
    assert next(r for r in compiled.report().passes if r.text == "fold_double_negation").modified


def test_what_patterns_match():
    *_, made = graph()
    outer = next(n for n in negations(made) if n.args[0].target is aten.neg.default)
    inner = outer.args[0]
    found = match(op(aten.neg.default, op(aten.neg.default, var("x"))), outer)
    assert isinstance(found, Match)
    assert (found.root, found["x"]) == (outer, inner.args[0])
    assert match(op([aten.tanh.default, aten.neg.default], var("x")), outer)["x"] is inner
    assert match(op(aten.tanh.default), outer) is None
    assert match(op(aten.neg.default, var("x"), var("y")), outer) is None
    square = made.graph.create_node("call_function", aten.mul.Tensor, (inner, inner))
    other = made.graph.create_node("call_function", aten.mul.Tensor, (inner, outer))
    twice = op(aten.mul.Tensor, var("x"), var("x"))
    assert match(twice, square)["x"] is inner
    assert match(twice, other) is None
    scaled = made.graph.create_node("call_function", aten.mul.Tensor, (inner, 2))
    assert match(op(aten.mul.Tensor, var("x"), 2), scaled)["x"] is inner
    assert match(op(aten.mul.Tensor, var("x"), 2.0), scaled) is None
    assert match(op(aten.mul.Tensor, var("x"), True), scaled) is None
    # inner is read by outer and by the products
    alone = op(aten.neg.default, op(aten.neg.default, only_reader=True))
    assert match(alone, outer) is None


def test_new_nodes_take_the_place_of_a_match():
    @dataclass(frozen=True)
    class Scale(PatternPass):
        name = "negate_by_scaling"
        level = "aten"
        pattern = op(aten.neg.default, var("x"))

        def rewrite(self, graph, match):
            return graph.emit(aten.mul.Tensor, (match["x"], -1.0), like=info(match.root))

    model, x, y, made = graph()
    before = grads_of(results_of(made, model, x, y))
    made.current_pass = "negate_by_scaling"
    assert Scale().run(made).modified
    verify(made)
    assert not [n for n in made.nodes if n.target is aten.neg.default]
    assert {info(n).made_by for n in made.nodes if n.target is aten.mul.Tensor and n.args[1] == -1.0} == {
        "negate_by_scaling"
    }
    assert_equal(grads_of(results_of(made, model, x, y)), before)
