"""The edit verbs, each against a plain PyTorch oracle: does it fire, what does it compute, what does it refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from graphrewrite.passes.compression.bf16 import BFloat16
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv1d_weight

import graphrewrite as gr
from graphrewrite.analysis.liveness import backward_curve
from graphrewrite.graph.nodes import (
    BufferUpdate,
    Grad,
    Loss,
    LossTerm,
    NodeInfo,
    Role,
    State,
    StateUpdate,
    Tap,
    UserInput,
    info,
    is_backward,
    value,
)
from graphrewrite.graph.ops import is_vjp
from graphrewrite.graph.partition import partition
from graphrewrite.graph.verify import verify
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import gradients
from helpers import assert_close, assert_equal, clean_graph, eager_grads, find, grads_of, joint_graph, run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Case:
    """A net, a batch, its joint graph, and what the graph computes."""

    captured: ClassVar[dict[type, gr.JointGraph]] = {}

    def __init__(self, kind: type[nn.Module] = Net) -> None:
        torch.manual_seed(5)
        self.model = kind().double()
        self.x, self.y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
        if kind not in self.captured:
            self.captured[kind] = joint_graph(self.model, self.x, self.y)
        self.graph = self.captured[kind].copy()

    @property
    def linears(self):
        return find(self.graph, "linear")

    @property
    def relus(self):
        return find(self.graph, "relu")

    def results(self, **options):
        verify(self.graph)
        return run(self.graph, self.model, self.x, self.y, **options)

    def grads(self, **options):
        return grads_of(self.results(**options))

    def oracle(self, logits: torch.Tensor, *others: torch.Tensor) -> dict[str, torch.Tensor]:
        return eager_grads(self.model, F.cross_entropy(logits, self.y) + sum(others))


@pytest.fixture
def case() -> Case:
    return Case()


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        ctx.backward_of, ctx.inputs = backward, inputs
        return forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return None, None, *ctx.backward_of(ctx.inputs, g)


def custom(forward, backward, *inputs):
    """The oracle of `replace_vjp`: `forward(*inputs)` whose derivative is `backward(inputs, g)`."""
    return _Custom.apply(forward, backward, *inputs)


# --- replace_vjp -----------------------------------------------------------------------------------------------


def test_replace_vjp_of_the_input_cotangent(case):
    b = case.linears[1]
    before = case.grads()
    case.graph.replace_vjp(b, lambda residuals, g: g @ residuals[1].sign(), part="d")
    grads, m = case.grads(), case.model
    z = custom(
        F.linear,
        lambda t, g: (g @ t[1].sign(), g.t() @ t[0], g.sum(0)),
        torch.relu(m.a(case.x)), m.b.weight, m.b.bias,
    )  # fmt: skip
    assert_close(grads, case.oracle(m.c(torch.relu(z))))
    for name in ("b.weight", "b.bias", "c.weight", "c.bias"):
        assert torch.equal(grads[name], before[name])
    assert not torch.equal(grads["a.weight"], before["a.weight"])


def test_replace_vjp_of_the_weight_gradient(case):
    before = case.grads()
    case.graph.replace_vjp(case.linears[1], lambda r, g: (g.sign().t() @ r[0], 2 * g.sum(0)), part="w")
    grads, m = case.grads(), case.model
    z = custom(
        F.linear,
        lambda t, g: (g @ t[1], g.sign().t() @ t[0], 2 * g.sum(0)),
        torch.relu(m.a(case.x)), m.b.weight, m.b.bias,
    )  # fmt: skip
    assert_close(grads, case.oracle(m.c(torch.relu(z))))
    assert torch.equal(grads["a.weight"], before["a.weight"])


def test_replace_vjp_of_a_whole_operator(case):
    """Straight-through: the default residuals end in the operator's output."""
    relu = case.relus[0]
    case.graph.replace_vjp(relu, lambda residuals, g: g + 0 * residuals[-1])
    m = case.model
    h = custom(torch.relu, lambda t, g: (g,), m.a(case.x))
    assert_close(case.grads(), case.oracle(m.c(torch.relu(m.b(h)))))
    assert case.graph.cotangent(case.linears[0]) is not None


def test_replace_vjp_with_residuals_of_its_own(case):
    """`fwd` computes in the forward what alone the backward reads."""
    relu = case.relus[0]
    case.graph.replace_vjp(relu, lambda r, g: g * r[0] + r[1], fwd=lambda z: (z > 0.1, z.mean()))
    m = case.model
    h = custom(torch.relu, lambda t, g: (g * (t[0] > 0.1) + t[0].mean(),), m.a(case.x))
    assert_close(case.grads(), case.oracle(m.c(torch.relu(m.b(h)))))
    made = [n for n in case.graph.forward_nodes() if info(n).made_by == "test"]
    assert {info(n).role for n in made} == {Role.FORWARD}
    assert {info(n).block for n in made} == {info(relu).block}


def test_replace_vjp_with_existing_residuals(case):
    first, second = case.relus
    case.graph.replace_vjp(second, lambda r, g: g * r[0].cos(), residuals=[first])
    m = case.model
    h = torch.relu(m.a(case.x))
    k = custom(torch.relu, lambda t, g: (g * h.detach().cos(),), m.b(h))
    assert_close(case.grads(), case.oracle(m.c(k)))


def test_replace_vjp_again_replaces_it_again(case):
    relu = case.relus[0]
    case.graph.replace_vjp(relu, lambda r, g: 5 * g)
    once = sum(1 for _ in case.graph.nodes)
    case.graph.replace_vjp(relu, lambda r, g: 2 * g)
    assert sum(1 for _ in case.graph.nodes) == once
    m = case.model
    h = custom(torch.relu, lambda t, g: (2 * g,), m.a(case.x))
    assert_close(case.grads(), case.oracle(m.c(torch.relu(m.b(h)))))


def test_replace_vjp_may_return_none(case):
    """As `detach`: no gradient below, and the nodes that computed it are gone."""
    case.graph.replace_vjp(case.linears[1], lambda r, g: None, part="d")
    grads = case.grads()
    assert set(grads) == {"b.weight", "b.bias", "c.weight", "c.bias"}
    m = case.model
    assert_close(grads, case.oracle(m.c(torch.relu(m.b(torch.relu(m.a(case.x)).detach())))))
    assert not [n for n in case.graph.backward_nodes() if info(n).block == "a"]


def test_replace_vjp_of_an_operator_with_several_outputs():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 6), nn.Linear(3, 3)

        def forward(self, x):
            left, right = self.a(x).split(3, 1)
            del right
            return self.c(left)

    case = Case(Split)
    (split,) = find(case.graph, "split") or find(case.graph, "split_with_sizes")
    seen = []

    def bwd(residuals, *cotangents):
        seen.append([c is None for c in cotangents])
        return torch.cat([cotangents[0], 3 * cotangents[0]], 1)

    case.graph.replace_vjp(split, bwd)
    m = case.model
    z = custom(lambda z: z[:, :3].clone(), lambda t, g: (torch.cat([g, 3 * g], 1),), m.a(case.x))
    assert_close(case.grads(), case.oracle(m.c(z)))
    assert seen[-1] == [False, True]  # one per output, None where none arrives


@pytest.mark.parametrize(
    ("bwd", "message"),
    [
        (lambda r, g: (g, g, g), "returned 3 cotangents, 2 are due"),
        (lambda r, g: (g, g.sum(0)), "as the cotangent of"),
        (lambda r, g: ((g.t() @ r[0]).float(), g.sum(0)), "torch.float32"),
    ],
)
def test_replace_vjp_checks_what_comes_back(case, bwd, message):
    with pytest.raises(gr.RuleError, match=message) as error:
        case.graph.replace_vjp(case.linears[1], bwd, part="w")
    assert (error.value.node, error.value.module) == (case.linears[1].name, "b")
    assert error.value.remedy


def test_replace_vjp_refusals_name_the_place(case):
    with pytest.raises(gr.RuleError, match="no 'd' part") as error:
        case.graph.replace_vjp(case.linears[0], lambda r, g: g, part="d")
    assert (error.value.node, error.value.module) == (case.linears[0].name, "a")
    with pytest.raises(gr.RuleError, match="must be tensors") as error:
        case.graph.replace_vjp(case.relus[0], lambda r, g: g, fwd=lambda z: (z, 3))
    assert error.value.node == case.relus[0].name
    with pytest.raises(gr.RuleError, match="mutates a tensor in place"):
        case.graph.replace_vjp(case.relus[0], lambda r, g: g.mul_(2))


# --- replace_primal --------------------------------------------------------------------------------------------


def feedback(graph, shape, name="test.b"):
    return graph.add_state(name, shape, lambda t, generator: t.normal_(generator=generator))


def test_replace_primal_is_feedback_alignment(case):
    state = {"test.b": torch.randn(5, 5).double()}
    case.graph.replace_primal(case.linears[1], 1, feedback(case.graph, (5, 5)))
    m = case.model
    z = custom(
        F.linear,
        lambda t, g: (g @ state["test.b"], g.t() @ t[0], g.sum(0)),
        torch.relu(m.a(case.x)), m.b.weight, m.b.bias,
    )  # fmt: skip
    assert_close(case.grads(state=state), case.oracle(m.c(torch.relu(z))))


def test_replace_primal_with_the_same_value_changes_no_number(case):
    before = case.grads()
    b = case.linears[1]
    case.graph.replace_primal(b, 1, b.args[1])
    assert_equal(case.grads(), before)


def test_replace_primal_of_a_convolution():
    """The input cotangent of a convolution with another kernel, same stride and padding."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv1d(1, 2, 3, padding=1)
            self.b = nn.Conv1d(2, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.b(torch.relu(self.a(x[:, None]))).mean(2)

    case = Case(Conv)
    state = {"test.b": torch.randn(3, 2, 3).double()}
    case.graph.replace_primal(find(case.graph, "conv1d")[1], 1, feedback(case.graph, (3, 2, 3)))
    m = case.model
    z = custom(
        lambda h, w, bias: F.conv1d(h, w, bias, stride=2, padding=1),
        lambda t, g: (
            conv1d_input(t[0].shape, state["test.b"], g, stride=2, padding=1),
            conv1d_weight(t[0], t[1].shape, g, stride=2, padding=1),
            g.sum((0, 2)),
        ),
        torch.relu(m.a(case.x[:, None])), m.b.weight, m.b.bias,
    )  # fmt: skip
    assert_close(case.grads(state=state), case.oracle(z.mean(2)))


def test_replace_primal_refuses_another_shape(case):
    with pytest.raises(gr.RuleError, match="cannot stand for") as error:
        case.graph.replace_primal(case.linears[1], 1, feedback(case.graph, (5, 4)))
    assert (error.value.node, error.value.module) == (case.linears[1].name, "b")


# --- cut, redirect ---------------------------------------------------------------------------------------------


def test_cut_is_detach(case):
    before = case.grads()
    (boundary,) = case.graph.boundaries("a")
    assert boundary is case.relus[0]
    case.graph.cut(boundary)
    grads, m = case.grads(), case.model
    assert_close(grads, case.oracle(m.c(torch.relu(m.b(torch.relu(m.a(case.x)).detach())))))
    for name, held in grads.items():
        assert torch.equal(held, before[name])
    assert not [n for n in case.graph.backward_nodes() if info(n).block == "a"]
    assert case.graph.cotangent(boundary) is None
    text = str(case.graph)
    case.graph.cut(boundary)
    assert str(case.graph) == text


class Skips(nn.Module):
    """Two ways from `a` to the end: through `b`, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(h + torch.relu(self.b(h)))


def test_cut_of_one_consumer():
    case = Case(Skips)
    (boundary,) = case.graph.boundaries("a")
    case.graph.cut(boundary, consumers=[case.linears[1]])
    m = case.model
    h = torch.tanh(m.a(case.x))
    assert_close(case.grads(), case.oracle(m.c(h + torch.relu(m.b(h.detach())))))


def test_redirect(case):
    """The signal is the cotangent at the boundary; below it the derivative is exact."""
    boundary = case.relus[0]
    error = case.graph.cotangent(case.linears[2])
    weight = feedback(case.graph, (3, 5))
    signal = case.graph.redirect(boundary, lambda e, w, h: e @ w * h.cos(), [error, weight, boundary])
    assert info(signal).role is Role.SIGNAL
    assert info(signal).cotangent_of is boundary
    assert info(signal).block == "a"
    assert info(signal).made_by == "test"
    state = {"test.b": torch.randn(3, 5).double()}
    m = case.model
    h = torch.relu(m.a(case.x))
    logits = m.c(torch.relu(m.b(h.detach())))
    (e,) = torch.autograd.grad(F.cross_entropy(logits, case.y), logits, retain_graph=True)
    taught = (h * (e @ state["test.b"] * h.cos()).detach()).sum()
    assert_close(case.grads(state=state), case.oracle(logits, taught))


def test_redirect_again_adds_a_signal(case):
    boundary, error = case.relus[0], case.graph.cotangent(case.linears[2])
    for factor in (1.0, 2.0):
        case.graph.redirect(boundary, lambda e, h, k=factor: k * h * e.sum(), [error, boundary])
    m = case.model
    h = torch.relu(m.a(case.x))
    logits = m.c(torch.relu(m.b(h.detach())))
    (e,) = torch.autograd.grad(F.cross_entropy(logits, case.y), logits, retain_graph=True)
    assert_close(case.grads(), case.oracle(logits, (h * (3 * h * e.sum()).detach()).sum()))


def test_redirect_to_targets(case):
    """Signals may read targets and inputs, and nothing of the error."""
    target = next(n for s, n in case.graph.inputs.items() if str(s) == "target y")
    boundary = case.relus[1]
    case.graph.redirect(boundary, lambda y, h: F.one_hot(y, 5).to(h.dtype), [target, boundary])
    m = case.model
    h = torch.relu(m.b(torch.relu(m.a(case.x))))
    expected = case.oracle(m.c(h.detach()), (h * F.one_hot(case.y, 5)).sum())
    assert_close(case.grads(), expected)


@pytest.mark.parametrize("signal", [lambda h: h[:, :2] * 1, lambda h: h.float()])
def test_redirect_refuses_another_shape_or_dtype(case, signal):
    with pytest.raises(gr.RuleError, match="teaching signal") as error:
        case.graph.redirect(case.relus[0], signal, [case.relus[0]])
    assert (error.value.node, error.value.module) == (case.relus[0].name, info(case.relus[0]).module)
    assert "shape and dtype" in error.value.remedy


def test_deferred_edits_come_out_as_edits_one_by_one():
    one, other = Case(), Case()
    for boundary in one.relus:
        one.graph.cut(boundary)
    with other.graph.deferred():
        for boundary in other.relus:
            other.graph.cut(boundary)
        assert len(other.graph.grads()) == 6  # nothing happened yet
    assert str(one.graph) == str(other.graph)


# --- teach, drop_backward --------------------------------------------------------------------------------------


def local_loss(h):
    return (h.square().sum(1) - 1).square().mean()


def test_teach_adds_a_loss_and_its_gradient(case):
    boundary = case.relus[0]
    case.graph.cut(boundary)
    node = case.graph.teach("a", local_loss, [boundary])
    assert info(node).role is Role.LOSS
    assert info(node).block == "a"
    results, m = case.results(), case.model
    h = torch.relu(m.a(case.x))
    logits = m.c(torch.relu(m.b(h.detach())))
    task = F.cross_entropy(logits, case.y)
    assert_close(grads_of(results), case.oracle(logits, local_loss(h)))
    torch.testing.assert_close(results[Loss()], (task + local_loss(h)).detach())
    torch.testing.assert_close(results[LossTerm("a")], local_loss(h).detach())
    torch.testing.assert_close(results[LossTerm("task")], task.detach())


def test_teach_without_a_cut_joins_the_cotangent_that_is_there(case):
    boundary = case.relus[0]
    case.graph.teach("a", local_loss, [boundary])
    m = case.model
    h = torch.relu(m.a(case.x))
    assert_close(case.grads(), case.oracle(m.c(torch.relu(m.b(h))), local_loss(h)))


def test_teach_with_a_learned_head(case):
    """Cotangents of a local loss go to learned state too."""
    head = case.graph.add_state("test.head", (3, 5), lambda t, g: t.zero_(), trainable=True)
    target = next(n for s, n in case.graph.inputs.items() if str(s) == "target y")
    boundary = case.relus[0]
    case.graph.cut(boundary)
    case.graph.teach("a", lambda h, w, y: F.cross_entropy(F.linear(h, w), y), [boundary, head, target])
    weight = torch.randn(3, 5).double().requires_grad_()
    grads, m = case.grads(state={"test.head": weight.detach()}), case.model
    h = torch.relu(m.a(case.x))
    local = F.cross_entropy(h @ weight.t(), case.y)
    expected = case.oracle(m.c(torch.relu(m.b(h.detach()))), local)
    expected["test.head"] = torch.autograd.grad(F.cross_entropy(h @ weight.t(), case.y), weight)[0]
    assert_close(grads, expected)


def test_teach_twice_reports_the_sum(case):
    """What is reported adds up to the loss, also where a block has two local losses."""
    for boundary in (case.relus[0], case.linears[0]):
        case.graph.teach("a", local_loss, [boundary])
    results = case.results()
    terms = [held for spec, held in results.items() if isinstance(spec, LossTerm)]
    torch.testing.assert_close(results[Loss()], sum(terms))


def test_teach_refuses_what_is_no_scalar(case):
    with pytest.raises(gr.RuleError, match="must be a scalar") as error:
        case.graph.teach("a", lambda h: h.mean(1), [case.relus[0]])
    assert error.value.module == "a"
    assert "mean" in error.value.remedy


def test_drop_backward_keeps_the_loss(case):
    case.graph.drop_backward()
    results = case.results()
    assert not grads_of(results)
    assert not case.graph.backward_nodes()
    torch.testing.assert_close(results[Loss()], F.cross_entropy(case.model(case.x), case.y).detach())
    case.graph.teach("a", local_loss, [case.relus[0]])
    assert set(case.grads()) == {"a.weight", "a.bias"}


# --- map_value, clone_forward ----------------------------------------------------------------------------------


def test_map_value_is_differentiated_through(case):
    boundary = case.relus[0]
    new = case.graph.map_value(boundary, lambda h: h / (h.norm(dim=1, keepdim=True) + 1))
    assert info(new).block == "b"
    assert info(new).role is Role.FORWARD
    m = case.model
    h = torch.relu(m.a(case.x))
    assert_close(case.grads(), case.oracle(m.c(torch.relu(m.b(h / (h.norm(dim=1, keepdim=True) + 1))))))


def test_map_value_for_some_consumers_with_further_inputs():
    case = Case(Skips)
    (boundary,) = case.graph.boundaries("a")
    scale = feedback(case.graph, (5,))
    case.graph.map_value(boundary, lambda h, s: h * s, consumers=[case.linears[1]], inputs=[scale], block="a")
    state = {"test.b": torch.randn(5).double()}
    m = case.model
    h = torch.tanh(m.a(case.x))
    assert_close(case.grads(state=state), case.oracle(m.c(h + torch.relu(m.b(h * state["test.b"])))))


def test_map_value_keeps_an_earlier_cut(case):
    """A rule may normalise a boundary that another one has cut."""
    case.graph.cut(case.relus[0])
    case.graph.map_value(case.relus[0], lambda h: 2 * h)
    m = case.model
    assert_close(case.grads(), case.oracle(m.c(torch.relu(m.b(2 * torch.relu(m.a(case.x)).detach())))))


def test_map_value_can_end_and_begin_differentiability(case):
    case.graph.map_value(case.relus[0], lambda h: h.detach() * 1)
    m = case.model
    assert_close(case.grads(), case.oracle(m.c(torch.relu(m.b(torch.relu(m.a(case.x)).detach())))))
    x = next(n for s, n in case.graph.inputs.items() if isinstance(s, UserInput))
    scale = case.graph.add_state("test.s", (4,), lambda t, g: t.fill_(1.0), trainable=True)
    case.graph.map_value(x, lambda x, s: x * s, consumers=[case.linears[0]], inputs=[scale])
    assert "test.s" not in case.grads(state={"test.s": torch.ones(4).double()})  # the cut above it still holds


def test_map_value_makes_an_input_learnable(case):
    x = next(n for s, n in case.graph.inputs.items() if isinstance(s, UserInput))
    scale = case.graph.add_state("test.s", (4,), lambda t, g: t.fill_(1.0), trainable=True)
    case.graph.map_value(x, lambda x, s: x * s, consumers=[case.linears[0]], inputs=[scale])
    s = torch.randn(4).double().requires_grad_()
    loss = F.cross_entropy(case.model(case.x * s), case.y)
    expected = {**eager_grads(case.model, loss), "test.s": None}
    expected["test.s"] = torch.autograd.grad(F.cross_entropy(case.model(case.x * s), case.y), s)[0]
    assert_close(case.grads(state={"test.s": s.detach()}), expected)


def test_clone_forward_runs_the_model_again(case):
    graph = case.graph
    x = next(n for s, n in graph.inputs.items() if isinstance(s, UserInput))
    like = NodeInfo(role=Role.FORWARD, block="a", copy="again")
    other = graph.splice(lambda x: x.flip(0) * 2, [x], like=like)
    mapping = graph.clone_forward({x: other}, "again")
    assert mapping[x] is other
    for old, new in mapping.items():
        if old is not x:
            assert info(new).copy == "again"
            assert (info(new).block, info(new).module) == (info(old).block, info(old).module)
            assert old.target is new.target
    assert graph.passes == ["again"]
    graph.tap(mapping[case.linears[2]], "second")
    graph.teach("b", lambda h, k: (h - k).square().mean(), [case.relus[1], mapping[case.relus[1]]])
    results, m = case.results(), case.model
    z = case.x.flip(0) * 2
    torch.testing.assert_close(results[Tap("second")], m(z).detach())

    def hidden(x):
        return torch.relu(m.b(torch.relu(m.a(x))))

    expected = case.oracle(m(case.x), (hidden(case.x) - hidden(z)).square().mean())
    assert_close(grads_of(results), expected)
    with pytest.raises(gr.RuleError, match="'again'"):
        graph.clone_forward({x: other}, "again")


def test_clone_forward_copies_only_what_depends_on_the_substitute(case):
    first = case.relus[0]
    like = info(first).but(copy="late")
    other = case.graph.splice(lambda h: h * 2, [first], like=like)
    mapping = case.graph.clone_forward({first: other}, "late")
    assert case.linears[0] not in mapping
    assert {n.target for n in mapping if n is not first} >= {case.linears[1].target}


def test_buffers_are_updated_by_one_pass():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.c = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x):
            return self.c(self.n(self.a(x)))

    for move in (False, True):
        case = Case(Normed)
        x = next(n for s, n in case.graph.inputs.items() if isinstance(s, UserInput))
        like = NodeInfo(role=Role.FORWARD, block="a", copy="again")
        logits = case.linears[-1]
        mapping = case.graph.clone_forward({x: case.graph.splice(lambda x: x + 3, [x], like=like)}, "again")
        case.graph.tap(mapping[logits], "second")
        if move:
            case.graph.move_updates(mapping)
        mean = case.results()[BufferUpdate("n.running_mean")]
        case.model(case.x + 3 * move)
        torch.testing.assert_close(mean, case.model.n.running_mean)


# --- state -----------------------------------------------------------------------------------------------------


def test_add_and_update_state(case):
    graph = case.graph
    node = graph.add_state("test.mean", (5,), lambda t, g: t.fill_(2.0))
    assert graph.add_state("test.mean", (5,), lambda t, g: t.zero_()) is node  # the same name, the same input
    assert value(node).dtype == torch.float64  # that of the parameters
    graph.update_state("test.mean", lambda m, h: 0.5 * m + h.mean(0), [case.relus[0]])
    results = case.results(state={"test.mean": torch.full((5,), 2.0).double()})
    h = torch.relu(case.model.a(case.x)).detach()
    torch.testing.assert_close(results[StateUpdate("test.mean")], 1 + h.mean(0))
    assert State("test.mean") in graph.inputs
    assert Grad(State("test.mean")) not in graph.outputs


def test_state_refusals(case):
    graph = case.graph
    with pytest.raises(gr.RuleError, match="changes with the input") as error:
        graph.add_state("test.s", (value(case.relus[0]).shape[0],), lambda t, g: t.zero_())
    assert "dynamic=None" in error.value.remedy
    graph.add_state("test.s", (2,), lambda t, g: t.zero_())
    with pytest.raises(gr.RuleError, match="exists with shape"):
        graph.add_state("test.s", (3,), lambda t, g: t.zero_())
    with pytest.raises(gr.RuleError, match=r"no state test\.t"):
        graph.update_state("test.t", lambda t: t, [])
    with pytest.raises(gr.RuleError, match="another shape"):
        graph.update_state("test.s", lambda s: s.sum(), [])


def test_state_of_another_kind_is_refused(case):
    """A name is one piece of state: fixed or learned, not both."""
    case.graph.add_state("test.s", (2,), lambda t, g: t.zero_())
    with pytest.raises(gr.RuleError, match=r"test\.s"):
        case.graph.add_state("test.s", (2,), lambda t, g: t.zero_(), trainable=True)


# --- tap -------------------------------------------------------------------------------------------------------


def test_tap_exposes_activations_and_cotangents(case):
    h = case.relus[0]
    before = case.grads()
    case.graph.tap(h, "h")
    case.graph.tap(case.graph.cotangent(h), "dh")
    results, m = case.results(), case.model
    hidden = torch.relu(m.a(case.x))
    (expected,) = torch.autograd.grad(F.cross_entropy(m.c(torch.relu(m.b(hidden))), case.y), hidden)
    torch.testing.assert_close(results[Tap("h")], hidden.detach())
    torch.testing.assert_close(results[Tap("dh")], expected)
    assert_equal(grads_of(results), before)


def test_tapped_cotangent_follows_a_later_edit(case):
    h = case.relus[0]
    case.graph.tap(case.graph.cotangent(h), "dh")
    case.graph.replace_vjp(case.linears[1], lambda r, g: 2 * g @ r[1], part="d")
    assert case.graph.outputs[Tap("dh")] is case.graph.cotangent(h)
    m = case.model
    hidden = torch.relu(m.a(case.x))
    (exact,) = torch.autograd.grad(F.cross_entropy(m.c(torch.relu(m.b(hidden))), case.y), hidden)
    torch.testing.assert_close(case.results()[Tap("dh")], 2 * exact)


# --- at the ATen level -----------------------------------------------------------------------------------------


def activations(graph):
    return [
        n for n in graph.forward_nodes() if info(n).role is Role.FORWARD and n.target is torch.ops.aten.relu.default
    ]


def test_encode_saved_and_recompute_need_the_aten_level(case):
    with pytest.raises(gr.RuleError, match="expanded graph"):
        case.graph.encode_saved(case.relus[0], BFloat16())
    with pytest.raises(gr.RuleError, match="expanded graph"):
        case.graph.recompute([case.relus[0]])


def test_verbs_of_the_operator_level_refuse_the_aten_level(case):
    graph = clean_graph(case.model, case.x, case.y)
    for edit in (graph.cut, graph.cotangent, lambda n: graph.replace_vjp(n, lambda r, g: g)):
        with pytest.raises(gr.RuleError, match="operator level") as error:
            edit(activations(graph)[0])
        assert "level = 'operator'" in error.value.remedy


def test_encode_saved_rounds_what_the_backward_reads(case):
    graph = clean_graph(case.model, case.x, case.y)
    first = activations(graph)[0]
    (stored,) = graph.encode_saved(first, BFloat16())
    assert value(stored).dtype == torch.bfloat16
    assert info(stored).block == info(first).block
    verify(graph)
    m = case.model
    rounded = lambda h: h.to(torch.bfloat16).to(h.dtype)  # noqa: E731
    h = custom(torch.relu, lambda t, g: (g * (rounded(t[0].relu()) > 0),), m.a(case.x))
    z = custom(F.linear, lambda t, g: (g @ t[1], g.t() @ rounded(t[0]), g.sum(0)), h, m.b.weight, m.b.bias)
    results = run(graph, m, case.x, case.y)
    assert torch.equal(results[Loss()], F.cross_entropy(m(case.x), case.y).detach())  # the forward reads it as it is
    assert_close(grads_of(results), case.oracle(m.c(torch.relu(z))))


@dataclass(frozen=True)
class SaveInBf16(gr.Pass):
    """A codec pass in a few lines: everything that is saved in float32 is saved in bfloat16."""

    name = "save_in_bf16"
    level = "aten"

    def run(self, graph):
        wide = [s.node for s in partition(graph).saved if s.nbytes and value(s.node).dtype == torch.float32]
        return gr.PassResult(graph, sum(bool(graph.encode_saved(node, BFloat16())) for node in wide) > 0)


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cnn", "gpt"))])
def test_bf16_codec_as_a_pass(name):
    case = zoo.make(name)
    x, y = case.batch(8)
    grads, saved, losses = [], [], []
    for passes in ([], [SaveInBf16()]):
        compiled = gr.compile(case.model, passes=passes, verify="numeric")
        torch.manual_seed(0)
        loss = compiled.loss(x, y)
        case.model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(case.model))
        saved.append(compiled.report().saved)
    assert torch.equal(*losses)  # the forward reads the values as they are

    def in_float32(rows):
        return sum(row.nbytes for row in rows if row.type.startswith("f32"))

    assert in_float32(saved[1]) <= 0.1 * in_float32(saved[0])
    assert sum(row.nbytes for row in saved[1]) < 0.65 * sum(row.nbytes for row in saved[0])
    rounded, exact = (torch.cat([g.flatten() for g in one.values()]) for one in reversed(grads))
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()


def test_encode_saved_of_what_is_not_saved_does_nothing(case):
    graph = clean_graph(case.model, case.x, case.y)
    text = str(graph)
    last = graph.loss_node()
    assert graph.encode_saved(last, BFloat16()) == []
    assert str(graph) == text


def test_encode_saved_refuses_a_codec_that_decodes_to_something_else(case):
    class Wrong(BFloat16):
        def decode(self, residuals, like):
            return residuals[0]

    graph = clean_graph(case.model, case.x, case.y)
    first = activations(graph)[0]
    with pytest.raises(gr.RuleError, match="another shape or dtype") as error:
        graph.encode_saved(first, Wrong())
    assert error.value.node == first.name


@pytest.mark.parametrize("each_block", [False, True])
def test_recompute_changes_no_number(case, each_block):
    graph = clean_graph(case.model, case.x, case.y)
    before = run(graph, case.model, case.x, case.y)
    count = graph.recompute(graph.forward_nodes(), each_block=each_block)
    assert count > 0
    verify(graph)
    for node in graph.backward_nodes():
        for source in node.all_input_nodes:
            assert source.op == "placeholder" or is_backward(source) or not isinstance(value(source), torch.Tensor)
    after = run(graph, case.model, case.x, case.y)
    assert_equal(grads_of(after), grads_of(before))
    assert graph.recompute(graph.forward_nodes()) == 0


def test_recomputing_for_each_block_holds_less_and_repeats_more():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]).double()
    x, y = torch.randn(32, 8, dtype=torch.float64), torch.randint(0, 8, (32,))
    counts, peaks = [], []
    for each_block in (False, True):
        graph = clean_graph(model, x, y)
        counts.append(graph.recompute(graph.forward_nodes(), each_block=each_block))
        peaks.append(backward_curve(partition(graph)).peak)
    assert counts[1] > counts[0]
    assert peaks[1] < peaks[0] - 2 * 32 * 8 * 8


def test_recompute_keeps_random_numbers():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).double()
    case = Case()
    graph = clean_graph(model, case.x, case.y)
    torch.manual_seed(1)
    before = run(graph, model, case.x, case.y)
    graph.recompute(graph.forward_nodes())
    torch.manual_seed(1)
    assert_equal(grads_of(run(graph, model, case.x, case.y)), grads_of(before))


# --- all of them ------------------------------------------------------------------------------------------------


EDITS = {
    "replace_vjp": lambda c: c.graph.replace_vjp(c.relus[0], lambda r, g: 2 * g),
    "cut": lambda c: c.graph.cut(c.relus[0]),
    "redirect": lambda c: c.graph.redirect(c.relus[0], lambda h: h.sin(), [c.relus[0]]),
    "teach": lambda c: c.graph.teach("a", local_loss, [c.relus[0]]),
    "map_value": lambda c: c.graph.map_value(c.relus[0], lambda h: h.sin()),
    "drop_backward": lambda c: c.graph.drop_backward(),
    "tap": lambda c: c.graph.tap(c.relus[0], "h"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_new_nodes_say_who_made_them(case, edit):
    known = set(case.graph.nodes)
    EDITS[edit](case)
    verify(case.graph)
    for node in case.graph.nodes:
        if node not in known and node.op == "call_function":
            assert info(node).made_by == "test"
            assert info(node).block in {"a", "b", "loss"}
            assert is_vjp(node) or info(node).role is not Role.COTANGENT or info(node).mirrors is not None


@pytest.mark.parametrize("second", EDITS)
@pytest.mark.parametrize("first", EDITS)
def test_verbs_combine(case, first, second):
    """Any two, in any order, leave a graph that verifies, runs, and can be expanded and copied."""
    EDITS[first](case)
    if first == second and first == "teach":
        return
    EDITS[second](case)
    copied = case.graph.copy()
    assert str(copied) == str(case.graph)
    assert_equal(grads_of(run(copied, case.model, case.x, case.y)), case.grads())
