"""The operator-level joint graph: mirrors, roles, accumulation, signature, meaning, copies, text."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.graph.nodes import (
    Buffer,
    BufferUpdate,
    Grad,
    Loss,
    LossTerm,
    Param,
    Role,
    Tangent,
    Target,
    UserInput,
    UserOutput,
    info,
    is_backward,
    value,
)
from graphrewrite.graph.ops import VjpCall, is_vjp
from graphrewrite.graph.text import operator_name
from graphrewrite.graph.verify import verify
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import call
from helpers import (
    assert_equal,
    assert_golden,
    aten_graph,
    eager_grads,
    find,
    forward_graph,
    grads_of,
    joint_graph,
    run,
)


def batch(n: int = 6):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def vjps_of(graph, node) -> dict[Role, object]:
    return {info(user).role: user for user in node.users if is_vjp(user) and VjpCall.of(user).mirror is node}


# --- mirrors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "unet", "gpt", "moe", "gcn"])
def test_every_vjp_mirrors_a_forward_operator(name):
    case = zoo.make(name)
    graph = joint_graph(case.model, *case.batch(4), blocks="auto")
    mirrored = set()
    for node in graph.nodes:
        if not is_vjp(node):
            continue
        mirror = info(node).mirrors
        assert mirror is VjpCall.of(node).mirror
        assert not is_backward(mirror)
        own, other = info(node), info(mirror)
        assert (own.block, own.module, own.source) == (other.block, other.module, other.source)
        assert (mirror, own.role) not in mirrored, "one node per operator and part"
        mirrored.add((mirror, own.role))
    assert mirrored


def test_separable_operators_have_a_cotangent_and_a_weight_gradient():
    graph = joint_graph(mlp(), *batch())
    first, second, last = find(graph, "linear")
    assert set(vjps_of(graph, first)) == {Role.GRADIENT}  # the input wants no gradient
    for node in (second, last):
        parts = vjps_of(graph, node)
        assert set(parts) == {Role.COTANGENT, Role.GRADIENT}
        assert VjpCall.of(parts[Role.COTANGENT]).wrt == (0,)
        assert VjpCall.of(parts[Role.GRADIENT]).wrt == (1, 2)


def test_normalisations_stay_in_one_piece():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    graph = joint_graph(model, *batch())
    (norm,) = find(graph, "layer_norm")
    (node,) = vjps_of(graph, norm).values()
    assert VjpCall.of(node).wrt == (0, 1, 2)
    # its elements know what each is for
    assert [info(element).role for element in graph.elements(node)] == [Role.COTANGENT, Role.GRADIENT, Role.GRADIENT]


@pytest.mark.parametrize(
    ("frozen", "roles"),
    [
        (["2.weight", "2.bias"], {Role.COTANGENT}),
        (["2.weight"], {Role.COTANGENT, Role.GRADIENT}),
        (["0.weight", "0.bias"], {Role.GRADIENT}),  # nothing below wants a cotangent
    ],
)
def test_frozen_parameters_lose_their_nodes(frozen, roles):
    model = mlp()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    graph = joint_graph(model, *batch())
    assert set(vjps_of(graph, find(graph, "linear")[1])) == roles
    assert {spec.of.name for spec in graph.outputs if isinstance(spec, Grad)} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


class FanOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return torch.sin(h) + torch.cos(h) * torch.tanh(h)


def test_cotangents_meet_in_the_order_of_autograd():
    """Three consumers: (last + middle) + first, as autograd's engine adds them."""
    graph = joint_graph(FanOut(), *batch())
    (linear,) = find(graph, "linear")
    total = graph.cotangent(linear)
    assert info(total).role is Role.ACCUMULATE
    assert info(total).cotangent_of is linear
    inner, first = total.args
    last, middle = inner.args
    assert [operator_name(info(n).mirrors) for n in (last, middle, first)] == ["tanh", "cos", "sin"]


# --- roles, blocks, signature --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "gat"])
def test_every_node_knows_where_it_comes_from(name):
    case = zoo.make(name)
    graph = joint_graph(case.model, *case.batch(4), blocks="auto")
    blocks = {block.name for block in graph.blocks}
    modules = dict(case.model.named_modules())
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        own = info(node)
        assert "val" in node.meta
        assert own.made_by
        assert own.module in modules
        if own.role is Role.LOSS:
            assert own.block == "loss"
        elif own.role is Role.FORWARD:
            assert own.block in blocks
    assert [b.index for b in graph.blocks] == list(range(len(graph.blocks)))


def test_source_is_the_users_line():
    graph = forward_graph(FanOut(), batch()[0])
    (node,) = find(graph, "tanh")
    file, _, line = info(node).source.rpartition(":")
    assert file == __file__
    assert "torch.tanh(h)" in pathlib.Path(file).read_text().splitlines()[int(line) - 1]


def test_signature_with_a_loss():
    case = zoo.make("cnn")
    graph = joint_graph(case.model, *case.batch(4), blocks="auto")
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    assert {s.name for s in inputs if isinstance(s, Param)} == {n for n, _ in case.model.named_parameters()}
    assert {s.name for s in inputs if isinstance(s, Buffer)} == {n for n, _ in case.model.named_buffers()}
    assert [s for s in inputs if isinstance(s, UserInput)] == [UserInput(0, "x")]
    assert [s for s in inputs if isinstance(s, Target)] == [Target(0, "y")]
    assert [s for s in inputs if isinstance(s, Tangent)] == [Tangent(Loss())]
    assert Loss() in outputs
    assert LossTerm("task") in outputs
    assert {s.name for s in outputs if isinstance(s, BufferUpdate)} == {n for n, _ in case.model.named_buffers()}
    assert {s.of.name for s in outputs if isinstance(s, Grad)} == {n for n, _ in case.model.named_parameters()}
    assert not [s for s in outputs if isinstance(s, UserOutput)]


def test_signature_without_a_loss():
    graph = joint_graph(mlp(), batch()[0])
    assert UserOutput(0) in graph.outputs
    assert Tangent(UserOutput(0)) in graph.inputs
    assert not graph.has_loss
    with pytest.raises(gr.RuleError, match="holds no loss"):
        graph.loss_node()


def test_tied_parameters_are_one_input():
    case = zoo.make("gpt")
    graph = joint_graph(case.model, *case.batch(4))
    assert graph.aliases == {"head.weight": "token.weight"}
    assert "head.weight" not in graph.parameters()
    total = graph.grads()[Param("token.weight")]
    assert info(total).role is Role.ACCUMULATE


def test_keyword_inputs_and_nested_targets_have_paths():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x, *, other, pair):
            return {"out": [self.a(x + other) * pair["scale"]]}

    x = gr.Inputs(torch.randn(5, 4), other=torch.randn(5, 4), pair={"scale": torch.randn(5, 3)})
    y = {"low": torch.randn(5, 3), "high": torch.randn(5, 3)}
    graph = joint_graph(Net(), x, y, loss=lambda o, y: ((o["out"][0] - y["low"]) * y["high"]).sum())
    paths = [s.path for s in graph.inputs if isinstance(s, (UserInput, Target))]
    assert paths == ["x", "other", "pair['scale']", "y['low']", "y['high']"]


# --- meaning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [joint_graph, aten_graph])
@pytest.mark.parametrize("name", ["mlp", "cnn", "unet", "gpt", "moe", "sage"])
def test_interpreter_is_eager_mode(name, level):
    case = zoo.make(name)
    x, y = case.batch(4)
    graph = level(case.model, x, y, blocks="auto")
    verify(graph)
    for size in case.sizes[:2]:  # the graph holds for other sizes
        x, y = case.batch(size)
        torch.manual_seed(1)
        results = run(graph, case.model, x, y)
        torch.manual_seed(1)
        expected = gr.default_loss(call(case.model, x), y)
        assert torch.equal(results[Loss()], expected.detach())
        assert_equal(grads_of(results), eager_grads(case.model, expected))


def test_interpreter_takes_any_cotangent():
    model, (x, _) = mlp(), batch()
    graph = joint_graph(model, x)
    cotangent = torch.randn(6, 3)
    results = run(graph, model, x, tangent=cotangent)
    out = model(x)
    assert torch.equal(results[UserOutput(0)], out.detach())
    assert_equal(grads_of(results), eager_grads(model, (out * cotangent).sum()))


def test_expansion_keeps_signature_and_provenance():
    case = zoo.make("gpt")
    x, y = case.batch(4)
    operator = joint_graph(case.model, x, y, blocks="auto")
    before = str(operator)
    graph = aten_graph(case.model, x, y, blocks="auto")
    assert str(operator) == before
    assert list(graph.outputs) == list(operator.outputs)
    assert list(graph.inputs) == list(operator.inputs)
    assert [b.name for b in graph.blocks] == [b.name for b in operator.blocks]
    roles = {(info(n).block, info(n).role) for n in graph.nodes if n.op == "call_function"}
    assert roles == {(info(n).block, info(n).role) for n in operator.nodes if n.op == "call_function"}
    for node in graph.nodes:
        if node.op == "call_function":
            assert info(node.meta["origin"]).module == info(node).module
            assert not is_vjp(node)


# --- copies --------------------------------------------------------------------------------------------------------


def test_copy_is_independent():
    model, (x, y) = mlp(), batch()
    graph = joint_graph(model, x, y)
    text = str(graph)
    other = graph.copy()
    assert str(other) == text
    assert not set(graph.nodes) & set(other.nodes)
    for node in other.nodes:
        if node.op != "output" and info(node).mirrors is not None:
            assert info(node).mirrors in set(other.nodes)
    assert_equal(grads_of(run(other, model, x, y)), grads_of(run(graph, model, x, y)))
    other.cut(find(other, "relu")[0])
    other.add_state("test.s", (2,), lambda t, g: t.zero_())
    verify(other)
    assert str(graph) == text
    assert "test.s" not in graph.state_inits
    assert len(grads_of(run(other, model, x, y, state={"test.s": torch.zeros(2)}))) == 4


def test_copy_of_an_edited_graph_can_be_edited_on():
    model, (x, y) = mlp(), batch()
    graph = joint_graph(model, x, y)
    first, second = find(graph, "relu")
    graph.cut(second)
    other = graph.copy()
    other.cut(first)
    graph.cut(first)
    assert str(other) == str(graph)


@pytest.mark.parametrize("name", ["cnn", "gpt"])
@pytest.mark.slow
def test_copy_of_an_expanded_graph(name):
    case = zoo.make(name)
    x, y = case.batch(4)
    graph = aten_graph(case.model, x, y, blocks="auto")
    torch.manual_seed(0)
    expected = grads_of(run(graph, case.model, x, y))
    torch.manual_seed(0)
    assert_equal(grads_of(run(graph.copy(), case.model, x, y)), expected)


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "gat"])
def test_text_is_the_same_on_every_capture(name):
    case = zoo.make(name)
    x, y = case.batch(4)
    first = str(joint_graph(case.model, x, y, blocks="auto"))
    assert str(joint_graph(zoo.make(name, seed=3).model, *case.batch(6), blocks="auto")) == first


def test_text_shows_every_node_once():
    case = zoo.make("cnn")
    graph = joint_graph(case.model, *case.batch(4), blocks="auto")
    text = str(graph)
    body = [line for line in text.partition("outputs\n")[0].splitlines() if line.startswith("  %")]
    names = [line.split()[0] for line in body]
    assert len(names) == len(set(names)) == sum(n.op != "output" for n in graph.nodes)
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        "graph at the operator level; blocks features.0:bp, features.4:bp, classifier:bp",
        "inputs",
        "forward",
        "backward",
        "outputs",
    ]


def test_text_does_not_depend_on_edits_that_were_undone():
    model, (x, y) = mlp(), batch()
    graph = joint_graph(model, x, y)
    text = str(graph)
    table = graph.backward
    table.cuts.add((find(graph, "relu")[0], find(graph, "linear")[1]))
    table.propagate()
    assert str(graph) != text
    table.cuts.clear()
    table.propagate()
    assert sorted(str(graph).splitlines()) == sorted(text.splitlines())


@pytest.mark.parametrize("rule", ["bp", "dfa", "fa", "ff{peer=0}", "mono_forward"])
def test_golden_graph(rule):
    """What a rule does to a small net, for a reviewer to read."""
    x, y = batch()
    compiled = gr.compile(mlp(), rule, example_inputs=x, example_targets=y, blocks="layers")
    assert_golden(compiled.graph("operator"), f"mlp_{rule.partition('{')[0]}")


def test_fake_values_are_symbolic_in_the_batch():
    graph = joint_graph(mlp(), *batch())
    (first, *_) = find(graph, "linear")
    assert isinstance(value(first).shape[0], torch.SymInt)
    assert not isinstance(value(joint_graph(mlp(), *batch(), dynamic=None).model_outputs[0]).shape[0], torch.SymInt)
