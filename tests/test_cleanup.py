"""Cleanup passes: when they fire and when not; no number, no metadata changes; a second run finds nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.compiler import CLEANUP
from graphrewrite.graph.nodes import NodeInfo, Role, Tap, info, is_backward
from graphrewrite.graph.text import operator_name
from graphrewrite.graph.verify import verify
from graphrewrite.pipeline import PassManager, build_pass
from graphrewrite.testing import zoo
from helpers import assert_equal, aten_graph, grads_of, run

aten = torch.ops.aten


def apply(name: str, graph) -> bool:
    result = build_pass(name).run(graph)
    assert result.graph is graph
    return result.modified


@functools.cache
def expanded(name: str):
    case = zoo.make(name)
    return case, case.batch(4), aten_graph(case.model, *case.batch(4), blocks="auto")


@pytest.mark.parametrize(
    "name", ["cnn", "gpt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unet", "gat", "moe", "t5"))]
)
def test_the_pipeline_changes_no_number_and_no_metadata(name):
    case, (x, y), graph = expanded(name)
    graph = graph.copy()
    known = {n: info(n) for n in graph.nodes if n.op != "output"}

    def results():
        torch.manual_seed(0)
        return run(graph, case.model, x, y)

    before = results()
    fired = []
    for one in CLEANUP:
        text, count = str(graph), len(graph.graph.nodes)
        modified = apply(one, graph)
        verify(graph)
        assert modified == (str(graph) != text or len(graph.graph.nodes) != count), one
        fired.append(modified)
        after = results()
        assert list(after) == list(before), one
        for spec, held in after.items():
            assert torch.equal(held, before[spec]), f"{one}: {spec}"
        for node in graph.nodes:
            assert node.op == "output" or info(node) == known[node], one
        assert not apply(one, graph), f"{one} finds more to do in a second run"
    assert any(fired)


# --- graphs made by hand -----------------------------------------------------------------------------------------


def graph_of(fn, *, parameters: int = 0, dynamic="auto"):
    """The expanded graph of `fn(x)`, or of `fn(x, w0, ...)` with learned inputs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(parameters)])

        def forward(self, x):
            return fn(x, *self.w)

    model, x = Net(), torch.randn(6, 4)
    return model, x, aten_graph(model, x, dynamic=dynamic)


def operators(graph) -> list[str]:
    return [operator_name(n) for n in graph.nodes if n.op == "call_function"]


def like(graph) -> NodeInfo:
    return NodeInfo(role=Role.FORWARD, block=graph.blocks[0].name)


def add_and_return(graph, *calls):
    """Emit calls and make them outputs, so that they are not dead."""
    nodes = []
    for i, (target, *args) in enumerate(calls):
        nodes.append(graph.emit(target, tuple(args), like=like(graph)))
        graph.add_output(Tap(f"t{i}"), nodes[-1])
    return nodes


def first_operator(graph):
    return next(n for n in graph.nodes if n.op == "call_function")


# --- dead code -----------------------------------------------------------------------------------------------------


def test_dead_code_goes():
    _, _, graph = graph_of(torch.sin)
    node = graph.emit(aten.cos.default, (first_operator(graph),), like=like(graph))
    graph.emit(aten.neg.default, (node,), like=like(graph))
    assert apply("eliminate_dead_code", graph)
    assert operators(graph) == ["sin"]
    assert not apply("eliminate_dead_code", graph)


def test_dead_random_operators_of_the_forward_stay():
    """Without them all later random numbers would be others than eager mode's."""
    _, _, graph = graph_of(torch.sin)
    node = graph.emit(aten.bernoulli.p, (first_operator(graph), 0.5), like=like(graph))
    assert not apply("eliminate_dead_code", graph)
    node.meta["gr"] = info(node).but(role=Role.COTANGENT)
    assert apply("eliminate_dead_code", graph)


def test_writes_of_the_backward_are_not_dead():
    """An in-place operator is read through the memory that it writes to."""
    model, x, graph = graph_of(lambda x, w: torch.view_as_real(torch.fft.rfft(x @ w, dim=1)), parameters=1)
    writes = [n for n in graph.nodes if operator_name(n).endswith("_") and is_backward(n)]
    apply("eliminate_dead_code", graph)
    assert all(n in set(graph.nodes) for n in writes)
    out = model(x)
    out.backward(torch.ones_like(out))
    grads = grads_of(run(graph, model, x, tangent=torch.ones(out.shape)))
    torch.testing.assert_close(grads["w.0"], model.w[0].grad)


# --- common subexpressions -----------------------------------------------------------------------------------------


def merged(*calls) -> bool:
    _, _, graph = graph_of(torch.sin)
    x = first_operator(graph)
    add_and_return(graph, *[(target, x, *args) for target, *args in calls])
    before = len(operators(graph))
    modified = apply("eliminate_common_subexpressions", graph)
    assert modified == (len(operators(graph)) < before)
    verify(graph)
    return modified


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((aten.mul.Tensor, 2.0), (aten.mul.Tensor, 2.0), True),
        ((aten.mul.Tensor, 2.0), (aten.mul.Tensor, 3.0), False),
        ((aten.mul.Tensor, 2.0), (aten.mul.Tensor, 2), False),  # an integer promotes differently
        ((aten.mul.Tensor, 1), (aten.mul.Tensor, True), False),
        ((aten.mul.Tensor, 0.0), (aten.mul.Tensor, -0.0), False),
        ((aten.mul.Tensor, 2.0), (aten.add.Tensor, 2.0), False),
        ((aten.sum.dim_IntList, [0]), (aten.sum.dim_IntList, [0]), True),
        ((aten.sum.dim_IntList, [0]), (aten.sum.dim_IntList, [1]), False),
        ((aten.bernoulli.p, 0.5), (aten.bernoulli.p, 0.5), False),  # random
    ],
)
def test_equal_calls_are_merged(first, second, expected):
    assert merged(first, second) is expected


def test_blocks_keep_their_own_values():
    """What a certificate says must not hang on a value that two blocks happen to compute alike."""
    _, _, graph = graph_of(torch.sin)
    graph.blocks = [*graph.blocks, gr.Block("other", 1)]
    x = first_operator(graph)
    one, two = add_and_return(graph, (aten.cos.default, x), (aten.cos.default, x))
    two.meta["gr"] = info(two).but(block="other")
    assert not apply("eliminate_common_subexpressions", graph)
    two.meta["gr"] = info(one).but(role=Role.COTANGENT)
    assert not apply("eliminate_common_subexpressions", graph)  # its value would have to be saved
    two.meta["gr"] = info(one)
    assert apply("eliminate_common_subexpressions", graph)


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "left"),
    [
        (lambda x: x.t().t() * 2, ["mul"]),
        (lambda x: x.t().t().t() * 2, ["t", "mul"]),
        (lambda x: x.transpose(0, 1).transpose(1, 0) * 2, ["mul"]),
        (lambda x: x.transpose(0, 1).transpose(-1, -2) * 2, ["mul"]),
        (lambda x: x[None].transpose(0, 1).transpose(1, 2) * 2, ["unsqueeze", "transpose", "transpose", "mul"]),
        (lambda x: x[None].permute(2, 0, 1).permute(1, 2, 0) * 2, ["unsqueeze", "mul"]),
        (lambda x: x[None].permute(2, 0, 1).permute(2, 0, 1) * 2, ["unsqueeze", "permute", "permute", "mul"]),
        (lambda x: x.view(-1, 2, 2).view(-1, 4) * 2, ["mul"]),
        (lambda x: x.view(-1, 2, 2).view(-1, 2) * 2, ["reshape", "mul"]),
        (lambda x: x.detach() * 2, ["mul"]),
        (lambda x: x.expand(-1, 4) * 2, ["mul"]),
        (lambda x: x[:, :1].expand(-1, 4) * 2, ["slice", "expand", "mul"]),
        (lambda x: x[:] * 2, ["mul"]),
        (lambda x: x[:, 1:] * 2, ["slice", "mul"]),
        (lambda x: x[:, ::2] * 2, ["slice", "mul"]),
    ],
)
def test_views_fold(fn, left):
    model, x, graph = graph_of(fn, dynamic=None)
    apply("fold_views", graph)
    apply("eliminate_dead_code", graph)
    assert operators(graph) == left
    verify(graph)
    (result,) = run(graph, model, x).values()
    assert torch.equal(result, fn(x))
    assert not apply("fold_views", graph)


def test_folded_views_hold_for_other_strides():
    """`view` becomes `reshape`: a cotangent may have other strides than the example's."""
    model, x, graph = graph_of(lambda x, w: (x @ w).view(-1), parameters=1)
    apply("fold_views", graph)
    assert "view" not in operators(graph)
    cotangent = torch.randn(48)[::2]
    grads = grads_of(run(graph, model, x, tangent=cotangent))
    model(x).backward(cotangent)
    assert torch.equal(grads["w.0"], model.w[0].grad)


# --- convolutions, statistics ------------------------------------------------------------------------------------


class Convs(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
        self.norm = norm or nn.Identity()

    def forward(self, x):
        return self.b(self.norm(torch.relu(self.a(x)))).mean((2, 3))


def expand_convs(norm: nn.Module | None = None):
    model = Convs(norm)
    x, y = torch.randn(4, 1, 7, 7), torch.randint(0, 3, (4,))
    graph = PassManager([build_pass("fold_views")]).run(aten_graph(model, x, y))
    return model, (x, y), graph


def test_the_two_halves_of_a_convolution_backward_are_merged():
    model, batch, graph = expand_convs()
    assert operators(graph).count("convolution_backward") == 3  # the first one wants no input cotangent
    before = grads_of(run(graph, model, *batch))
    assert apply("merge_convolution_backward", graph)
    verify(graph)
    assert operators(graph).count("convolution_backward") == 2
    assert_equal(grads_of(run(graph, model, *batch)), before)
    assert not apply("merge_convolution_backward", graph)


def test_convolutions_with_other_feedback_are_not_merged():
    """Where the input cotangent reads another kernel, the calls differ."""
    x, y = torch.randn(4, 1, 7, 7), torch.randint(0, 3, (4,))

    class Feedback(gr.Pass):
        name = "feedback"

        def run(self, graph):
            node = [n for n in graph.forward_nodes() if operator_name(n) == "conv2d"][1]
            state = graph.add_state("test.b", (3, 2, 3, 3), lambda t, g: t.normal_(generator=g))
            graph.replace_primal(node, 1, state)
            return gr.PassResult(graph, True)

    graph = gr.compile(Convs(), passes=[Feedback()]).materialize(x, y).graph("aten")
    assert operators(graph).count("convolution_backward") == 3


def test_batch_norm_backward_reads_no_running_statistics_in_training():
    model, batch, graph = expand_convs(nn.BatchNorm2d(2))

    def statistics():
        (node,) = [n for n in graph.nodes if operator_name(n) == "native_batch_norm_backward"]
        return node.args[3:5]

    assert None not in statistics()
    before = grads_of(run(graph, model, *batch))
    assert apply("drop_unread_statistics", graph)
    assert statistics() == (None, None)
    assert_equal(grads_of(run(graph, model, *batch)), before)
    assert not apply("drop_unread_statistics", graph)


def test_batch_norm_with_fixed_statistics_keeps_them():
    norm = nn.BatchNorm2d(2).eval()
    _, _, graph = expand_convs(norm)
    assert not apply("drop_unread_statistics", graph)
