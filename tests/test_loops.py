"""The verb `repeat`: one node whose body runs again and again, in the interpreter, after expansion and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.analysis.cost import count
from graphrewrite.analysis.liveness import LiveBytes
from graphrewrite.graph.expand import expand
from graphrewrite.graph.loop import OPERATOR, LoopCall, is_loop, labelled
from graphrewrite.graph.nodes import NodeInfo, Role, Tap, value
from graphrewrite.graph.verify import verify
from helpers import find, joint_graph, run

LIKE = NodeInfo(role=Role.SIGNAL, block="0", module="0")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def looped(steps: int, body=None):
    """x <- x - 0.1 d/dx of |x W^T|^2 / 2, from the first activation on; another batch size than the captured one."""
    model, x, y = net(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    graph = joint_graph(model, x, y)

    def descend(state: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        with torch.enable_grad(), labelled(LIKE.but(role=Role.COTANGENT, block="2")):
            leaf = state.detach().requires_grad_()
            (slope,) = torch.autograd.grad((leaf @ weight.T).square().sum() / 2, leaf)
        return [state - 0.1 * slope]

    (start,) = find(graph, "tanh")
    weight = graph.parameters()["0.weight"]
    (end,) = graph.repeat(body or descend, [start], steps, inputs=[weight], like=LIKE)
    graph.tap(end, "end")
    return model, x, y, graph


def by_hand(model: nn.Module, x: torch.Tensor, steps: int) -> torch.Tensor:
    weight = model[0].weight.detach()
    state = torch.tanh(model[0](x)).detach()
    for _ in range(steps):
        state = state - 0.1 * (state @ weight.T @ weight)
    return state


@pytest.mark.parametrize("steps", [7, *[pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)]])
def test_a_loop_is_its_body_repeated_at_every_level(steps):
    model, x, y, graph = looped(steps)
    verify(graph)
    expanded = expand(graph)
    verify(expanded)
    other = torch.randn(2, 4).double()
    for level in (graph, graph.copy(), expanded):
        for batch, targets in ((x, y), (other, y[:2])):
            found = run(level, model, batch, targets)[Tap("end")]
            torch.testing.assert_close(found, by_hand(model, batch, steps), rtol=1e-12, atol=0)


def test_the_graph_does_not_grow_with_the_steps_but_the_work_does():
    small, large = looped(2)[3], looped(200)[3]
    assert len(small.graph.nodes) == len(large.graph.nodes)
    assert len(expand(small).graph.nodes) == len(expand(large).graph.nodes)
    texts = [str(graph).replace(f"steps={n}", "steps=N") for graph, n in ((small, 2), (large, 200))]
    assert texts[0] == texts[1]
    assert "repeat(body0, steps=N" in texts[0]
    assert "body0.state0" in texts[0]
    work = [count(expand(graph)).by_role["cotangent"] for graph in (small, large)]
    without = count(expand(joint_graph(net(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))))
    base = without.by_role["cotangent"]
    assert (work[1] - base) == 100 * (work[0] - base) > 0


def test_what_a_loop_allocates_is_measured_and_predicted():
    *_, graph = looped(3)
    (loop,) = [node for node in graph.nodes if is_loop(node)]
    call = LoopCall.of(loop)
    state, weight = torch.randn(5, 4).double(), torch.randn(4, 4).double()
    with LiveBytes([state, weight]) as live:
        OPERATOR([state], [weight], 3, call.body.number)
    assert live.peak >= 2 * state.numel() * 8


def test_inner_labels_stay_with_the_operators():
    *_, graph = looped(1)
    (loop,) = [node for node in graph.nodes if is_loop(node)]
    blocks = {node.meta["gr"].block for node in LoopCall.of(loop).body.nodes}
    assert blocks == {"0", "2"}
    assert all(value(node) is not None for node in LoopCall.of(loop).body.nodes)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (lambda s, w: [s[:1]], "keeps its shape"),
        (lambda s, w: [s.float()], "keeps its shape"),
        (lambda s, w: [s, s], "2 values for 1"),
        (lambda s, w: [s.add_(1)], "changes what it is given"),
    ],
)
def test_bodies_that_are_no_step_are_refused(body, text):
    with pytest.raises(gr.RuleError, match=text):
        looped(2, body)


def test_negative_steps_are_refused():
    with pytest.raises(gr.RuleError, match="-1 steps"):
        looped(-1)
