"""Random models: gradients bitwise those of eager mode, and the functor laws of backpropagation."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from torch import nn

import graphrewrite as gr
from graphrewrite.graph.text import operator_name
from graphrewrite.testing.compare import assert_same, assert_trains_like_eager, gradients
from random_dags import WIDTH, Dag, check, programs


def batches():
    return [(torch.randn(n, WIDTH), torch.randint(0, 3, (n,))) for n in (5, 3)]


@given(programs)
@check(8, derandomize=True)
def test_gradients_are_those_of_eager_mode(program):
    assert_trains_like_eager(Dag(program), batches(), through="loss")


@pytest.mark.slow
@given(programs)
@check(300, derandomize=False)
def test_gradients_are_those_of_eager_mode_in_full(program):
    assert_trains_like_eager(Dag(program), [*batches(), *batches()], verify="numeric")


# --- functor laws ----------------------------------------------------------------------------------------------------


def assert_same_gradients(left: nn.Module, right: nn.Module) -> None:
    expected = gradients(right)
    for name, gradient in gradients(left).items():
        assert_same(gradient, expected[name], name)


@given(programs, programs)
@check(2, derandomize=True)
def test_composition(first, second):
    assert_composes(first, second)


@pytest.mark.slow
@given(programs, programs)
@check(30, derandomize=False)
def test_composition_in_full(first, second):
    assert_composes(first, second)


def assert_composes(first, second):
    """Compiling g after f is compiling f, compiling g, and composing them."""
    whole = nn.Sequential(Dag(first, out=WIDTH), Dag(second))
    parts = copy.deepcopy(whole)
    x, y = batches()[0]
    composed = nn.Sequential(gr.compile(parts[0]), gr.compile(parts[1]))
    gr.default_loss(gr.compile(whole)(x), y).backward()
    gr.default_loss(composed(x), y).backward()
    assert_same_gradients(whole, parts)


def test_identity_maps_to_identity():
    compiled = gr.compile(nn.Identity())
    x = torch.randn(4, 5, requires_grad=True)
    out = compiled(x)
    cotangent = torch.randn(4, 5)
    out.backward(cotangent)
    assert torch.equal(out, x)
    assert torch.equal(x.grad, cotangent)
    assert not [n for n in compiled.graph("aten").nodes if n.op == "call_function"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_identity_is_neutral(where):
    net = nn.Linear(6, 3)
    padded = nn.Sequential(nn.Identity(), net) if where == "before" else nn.Sequential(net, nn.Identity())
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))

    def operators(graph):
        return [*graph.forward_nodes(), *graph.backward_nodes()]

    left, right = (gr.compile(m, example_inputs=x, example_targets=y).graph("operator") for m in (padded, net))
    assert [operator_name(n) for n in operators(left)] == [operator_name(n) for n in operators(right)]


def test_input_gradients_compose_through_eager_modules():
    """A compiled module in the middle of an eager one hands its input's cotangent on."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    reference = copy.deepcopy(model)
    mixed = nn.Sequential(model[0], gr.compile(model[1]), model[2], model[3])
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    gr.default_loss(mixed(x), y).backward()
    gr.default_loss(reference(x), y).backward()
    assert_same_gradients(model, reference)
