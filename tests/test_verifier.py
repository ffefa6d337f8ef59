"""The verifier: for every invariant a graph that breaks this one, and nothing else."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.graph.nodes import Grad, NodeInfo, Param, Role, State, Tap, UserInput, info, value
from graphrewrite.graph.ops import is_vjp
from graphrewrite.graph.verify import verify
from helpers import find, joint_graph

X, Y = torch.randn(6, 4), torch.randint(0, 3, (6,))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) / x.shape[0])


@pytest.fixture(scope="module")
def captured():
    return joint_graph(Net(), X, Y)


@pytest.fixture
def graph(captured):
    return captured.copy()


def relu(graph):
    return find(graph, "relu")[0]


def linear(graph, number: int = 0):
    return find(graph, "linear")[number]


def x_input(graph):
    return next(n for s, n in graph.inputs.items() if isinstance(s, UserInput))


def fake(graph, *shape, dtype=torch.float32, device="cpu"):
    with graph.tracing():
        return torch.empty(shape, dtype=dtype, device=device)


def batch_of(graph):
    return value(relu(graph)).shape[0]


# --- what is broken, and how the error says it -------------------------------------------------------------------


def use_before_definition(graph):
    relu(graph).append(linear(graph))
    return relu


def missing_user(graph):
    del linear(graph).users[relu(graph)]
    return relu


def late_input(graph):
    with graph.graph.inserting_after(relu(graph)):
        node = graph.graph.placeholder("late")
    node.meta.update(gr=NodeInfo(role=Role.INPUT, spec=State("late")), val=fake(graph, 2))
    return lambda _: node


def foreign_kind(graph):
    graph.module.inner = nn.ReLU()
    with graph.graph.inserting_after(relu(graph)):
        node = graph.graph.call_module("inner", (relu(graph),))
    return lambda _: node


def no_info(graph):
    node = relu(graph)
    del node.meta["gr"]
    return lambda _: node


def no_value(graph):
    del relu(graph).meta["val"]
    return relu


def no_provenance(graph):
    relu(graph).meta["gr"] = info(relu(graph)).but(made_by="")
    return relu


def no_specification(graph):
    x_input(graph).meta["gr"] = info(x_input(graph)).but(spec=None)
    return


def same_specification_twice(graph):
    first, second = list(graph.parameters().values())[:2]
    second.meta["gr"] = info(second).but(spec=info(first).spec)
    return


def shared_fake_value(graph):
    first = graph.placeholder(State("one"), fake(graph, 2), "one")
    second = graph.placeholder(State("two"), value(first), "two")
    return lambda _: second


def result_without_specification(graph):
    node = graph.output_node
    node.meta["specs"] = node.meta["specs"][:-1]
    return


def two_results_with_one_specification(graph):
    node = graph.output_node
    node.meta["specs"] = (*node.meta["specs"][:-1], node.meta["specs"][0])
    return


def constant_result(graph):
    node = graph.output_node
    node.args = ((*node.args[0], 3),)
    node.meta["specs"] = (*node.meta["specs"], Tap("three"))
    return


def gradient_of_nothing(graph):
    graph.add_output(Grad(Param("gone")), next(iter(graph.grads().values())))
    return


def gradient_of_wrong_shape(graph):
    weight, bias = (graph.grads()[Param(f"a.{n}")] for n in ("weight", "bias"))
    graph.add_output(Grad(Param("a.weight")), bias)
    del weight
    return lambda _: bias


def gradient_of_wrong_dtype(graph):
    bias = graph.grads()[Param("a.bias")]
    half = graph.emit(torch.ops.aten._to_copy.default, (bias,), {"dtype": torch.float16}, like=info(bias))
    graph.add_output(Grad(Param("a.bias")), half)
    return lambda _: half


def forward_reads_cotangent(graph):
    like = info(relu(graph))
    node = graph.emit(torch.ops.aten.neg.default, (graph.cotangent(relu(graph)),), like=like)
    return lambda _: node


def forward_reads_tangent(graph):
    tangent = graph.loss_tangent(torch.float32)
    node = graph.emit(torch.ops.aten.neg.default, (tangent,), like=info(relu(graph)))
    return lambda _: node


def unknown_block(graph):
    relu(graph).meta["gr"] = info(relu(graph)).but(block="nowhere")
    return relu


def wrong_shape(graph):
    relu(graph).meta["val"] = fake(graph, batch_of(graph), 4)
    return relu


def wrong_rank(graph):
    relu(graph).meta["val"] = fake(graph, batch_of(graph), 5, 1)
    return relu


def wrong_dtype(graph):
    relu(graph).meta["val"] = fake(graph, batch_of(graph), 5, dtype=torch.float64)
    return relu


def wrong_device(graph):
    relu(graph).meta["val"] = fake(graph, batch_of(graph), 5, device="meta")
    return relu


def baked_batch_size(graph):
    """The example's size in the place of the symbol: right for this batch, wrong for the next."""
    relu(graph).meta["val"] = fake(graph, 6, 5)
    return relu


def wrong_size_value(graph):
    node = find(graph, "sym_size")[0]
    node.meta["val"] = node.meta["val"] + 1
    return lambda _: node


def real_value(graph):
    relu(graph).meta["val"] = torch.zeros(6, 5)
    return relu


def no_tensor(graph):
    relu(graph).meta["val"] = (value(relu(graph)),)
    return relu


def wrong_arguments(graph):
    relu(graph).args = (relu(graph).args[0], 3)
    return relu


def wrong_shapes_inside(graph):
    linear(graph, 1).args = (x_input(graph), *linear(graph, 1).args[1:])
    return lambda g: linear(g, 1)


def wrong_vjp_value(graph):
    node = next(n for n in graph.nodes if is_vjp(n) and info(n).mirrors is relu(graph))
    node.meta["val"] = fake(graph, 5, batch_of(graph))
    return lambda _: node


def wrong_vjp_structure(graph):
    node = next(n for n in graph.nodes if is_vjp(n) and isinstance(value(n), tuple))
    node.meta["val"] = node.meta["val"][:1]
    return lambda _: node


CASES = {
    use_before_definition: "before it is computed",
    missing_user: "is no user of linear",
    late_input: "input stands behind an operator",
    foreign_kind: "call_module",
    no_info: "no NodeInfo",
    no_value: "no fake value",
    no_provenance: "no provenance",
    no_specification: "inputs without a specification",
    same_specification_twice: "two with the same one",
    shared_fake_value: "shares its fake value with input",
    result_without_specification: "differ in number",
    two_results_with_one_specification: "same specification",
    constant_result: "is no node but 3",
    gradient_of_nothing: "parameter gone: the graph has no such input",
    gradient_of_wrong_shape: r"gradient of parameter a.weight is torch.float32 \(5,\), not",
    gradient_of_wrong_dtype: r"gradient of parameter a.bias is torch.float16",
    forward_reads_cotangent: "forward node reads the cotangent",
    forward_reads_tangent: "forward node reads the cotangent",
    unknown_block: "block 'nowhere', which does not exist",
    wrong_shape: "its recorded value is",
    wrong_rank: "its recorded value is",
    wrong_dtype: "its recorded value is torch.float64",
    wrong_device: "its recorded value",
    baked_batch_size: "its recorded value is",
    wrong_size_value: "its recorded value",
    real_value: "real tensor",
    no_tensor: "another structure",
    wrong_arguments: "cannot run on the values of its inputs",
    wrong_shapes_inside: "cannot run on the values of its inputs",
    wrong_vjp_value: "its recorded value is",
    wrong_vjp_structure: "another structure",
}


@pytest.mark.parametrize("break_it", CASES, ids=lambda f: f.__name__)
def test_broken_invariant(graph, break_it):
    verify(graph)
    culprit = break_it(graph)
    with pytest.raises(gr.VerifyError, match=CASES[break_it]) as error:
        verify(graph)
    if culprit is not None:
        node = culprit(graph)
        assert error.value.node == node.name
        if "gr" in node.meta and info(node).module:
            assert error.value.module == info(node).module


def test_the_quick_check_leaves_values_out(graph):
    wrong_shape(graph)
    verify(graph, recompute=False)


def test_a_rule_may_declare_that_its_forward_reads_cotangents(graph):
    forward_reads_cotangent(graph)
    graph.forward_may_read_cotangents = True
    verify(graph)


def test_lint_alone_accepts_wrong_shapes(graph):
    """Why there is a verifier."""
    wrong_shape(graph)
    graph.graph.lint()


def test_edits_by_hand_without_emit_are_found():
    """An operator created with fx alone has neither value nor provenance."""
    graph = joint_graph(Net(), X, Y)
    with graph.graph.inserting_after(relu(graph)):
        graph.graph.call_function(operator.neg, (relu(graph),))
    with pytest.raises(gr.VerifyError, match=r"graph\.emit"):
        verify(graph)
