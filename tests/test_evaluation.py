"""Answers of single blocks, and shares of zeros, against the same by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite import evaluation
from graphrewrite.datasets import Split
from graphrewrite.testing import zoo
from graphrewrite.training import accuracy

HEAD = "_graphrewrite.{rule}.head.{block}.{key}"


def compiled_mlp(rule: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    x, y = torch.randn(20, 8), torch.randint(0, 4, (20,))
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y, blocks="layers")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        compiled.loss(x, y).backward()
        optimizer.step()
    return compiled, model, x, y


def hidden(model, x):
    first = torch.relu(model[0](x))
    return first, torch.relu(model[2](first))


@pytest.mark.parametrize(
    ("rule", "bias"), [("mono_forward", False), pytest.param("local_loss{head=predsim}", True, marks=pytest.mark.slow)]
)
def test_heads_answer_alone(rule, bias):
    compiled, model, x, y = compiled_mlp(rule)
    state, name = compiled.state_dict(), rule.partition("{")[0]
    expected = {}
    with torch.no_grad():
        for block, h in zip(("0", "2"), hidden(model, x), strict=True):
            keys = [HEAD.format(rule=name, block=block, key=k) for k in ("weight", "bias")]
            expected[block] = F.linear(h, state[keys[0]], state[keys[1]] if bias else None)
        expected["4"] = model(x)
    found = evaluation.block_predictions(compiled, x)
    assert list(found) == ["0", "2", "4"]
    for block, scores in expected.items():
        torch.testing.assert_close(found[block], scores)
    y[:3] = -100
    wanted = {b: ((s.argmax(1) == y)[3:]).float().mean().item() for b, s in expected.items()}
    found_accuracy = evaluation.block_accuracy(compiled, Split(x, y), batch=7)
    assert found_accuracy == pytest.approx(wanted)
    assert found_accuracy["4"] == accuracy(compiled, Split(x, y))
    assert compiled.training


@pytest.mark.slow
def test_goodness_answers_alone_and_zeros_are_those_of_the_neutral_pass():
    compiled, model, x, _ = compiled_mlp("ff")

    def normalised(h):
        return h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)

    wanted = {"0": [], "2": []}
    with torch.no_grad():
        for label in range(4):
            written = x.clone()
            written[:, :4] = F.one_hot(torch.full((20,), label), 4).float()
            first = torch.relu(model[0](normalised(written)))
            second = torch.relu(model[2](normalised(first)))
            wanted["0"].append(first.square().mean(1))
            wanted["2"].append(second.square().mean(1))
    found = evaluation.block_predictions(compiled, x)
    assert found.keys() == wanted.keys()
    for block, columns in wanted.items():
        torch.testing.assert_close(found[block], torch.stack(columns, 1))
    with torch.no_grad():
        neutral = x.clone()
        neutral[:, :4] = 0.25
        first = torch.relu(model[0](normalised(neutral)))
        second = torch.relu(model[2](normalised(first)))
    expected = {"0": (first == 0).float().mean().item(), "2": (second == 0).float().mean().item()}
    assert evaluation.sparsity(compiled, x) == pytest.approx(expected)


@pytest.mark.slow
def test_layers_of_a_graph_network_answer_alone():
    case = zoo.make("gcn")
    torch.manual_seed(0)
    x, y = case.batch(6)
    compiled = gr.compile(case.model, "forward_gnn", example_inputs=x, example_targets=y)
    compiled.loss(x, y).backward()
    found = evaluation.block_predictions(compiled, x)
    assert len(found) == 3
    torch.testing.assert_close(torch.stack(list(found.values())).sum(0), compiled.predict(x))
    assert all(0 <= share <= 1 for share in evaluation.block_accuracy(compiled, Split(x, y)).values())


@pytest.mark.parametrize(("rule", "why"), [("bp", "no answer of their own"), ("local_loss{head=sim}", "Sim gives no")])
def test_blocks_without_an_answer_say_so(rule, why):
    compiled, _, x, _ = compiled_mlp(rule)
    with pytest.raises(gr.RuleError, match=why):
        evaluation.block_predictions(compiled, x)


def test_sparsity_counts_zeros():
    compiled, model, x, _ = compiled_mlp("bp")
    with torch.no_grad():
        model[0].bias[:6] = -100.0
        first, second = hidden(model, x)
    expected = {"0": (first == 0).float().mean().item(), "2": (second == 0).float().mean().item()}
    assert expected["0"] >= 0.5
    assert evaluation.sparsity(compiled, x) == pytest.approx(expected)
