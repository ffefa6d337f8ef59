"""`torch.compile(backend="graphrewrite")`."""

from __future__ import annotations

import copy

import pytest
import torch
from graphrewrite.backends import dynamo
from torch import nn
from torch.nn import functional as F

from graphrewrite.errors import BackendError
from helpers import assert_close, assert_equal, eager_grads


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch.compiler.reset()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def grads_through(model: nn.Module, call, x, y) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(call(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_backpropagation_is_eager_for_every_size():
    model = net()
    reference = copy.deepcopy(model)
    made = []
    call = torch.compile(model, backend="graphrewrite", options={"on_compile": made.append})
    for size in (5, 9, 12, 4):
        x, y = batch(size)
        expected = eager_grads(reference, F.cross_entropy(reference(x), y))
        assert_equal(grads_through(model, call, x, y), expected)
    # once for the first size, once for all others
    assert len(made) == 2


def test_dfa_is_its_formula():
    model, (x, y), made = net().double(), batch(), []
    x = x.double()
    call = torch.compile(model, backend="graphrewrite", options={"rule": "dfa", "on_compile": made.append})
    found = grads_through(model, call, x, y)
    (compiled,) = made
    feedback = list(compiled.rule_state.values())
    h1 = torch.relu(model[0](x))
    h2 = torch.relu(model[2](h1))
    out = model[4](h2)
    (error,) = torch.autograd.grad(F.cross_entropy(out, y), out, retain_graph=True)
    shared = [
        b[:, : h.shape[1]] for b, h in zip(feedback * 2 if len(feedback) == 1 else feedback, (h1, h2), strict=True)
    ]
    d1, d2 = error @ shared[0] * (h1 > 0), error @ shared[1] * (h2 > 0)
    expected = {
        "0.weight": d1.t() @ x,
        "0.bias": d1.sum(0),
        "2.weight": d2.t() @ h1,
        "2.bias": d2.sum(0),
        "4.weight": error.t() @ h2,
        "4.bias": error.sum(0),
    }
    assert_close(found, {name: g.detach() for name, g in expected.items()})


def test_buffers_are_updated_and_evaluation_is_the_models_own():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    reference = copy.deepcopy(model)
    call = torch.compile(model, backend="graphrewrite")
    x, y = batch()
    expected = eager_grads(reference, F.cross_entropy(reference(x), y))
    assert_equal(grads_through(model, call, x, y), expected)
    assert torch.equal(model[1].running_mean, reference[1].running_mean)
    assert model[1].num_batches_tracked.item() == 1
    with torch.no_grad():
        assert torch.equal(call.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    ("rule", "reason"), [("ff", "needs the targets"), ("kp", "learns state"), ("weight_mirror", "learns state")]
)
def test_rules_that_need_more_are_refused(rule, reason):
    call = torch.compile(net(), backend="graphrewrite", options={"rule": rule})
    with pytest.raises(Exception, match=reason) as caught:
        call(batch()[0])
    assert isinstance(caught.value.inner_exception, BackendError)


@torch.compiler.disable
def outside(h: torch.Tensor) -> torch.Tensor:
    return h


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        return self.b(outside(h))


def test_a_graph_in_pieces_is_refused():
    call = torch.compile(Broken(), backend="graphrewrite", options={"rule": "dfa"})
    with pytest.raises(Exception, match="broke the model's graph in pieces"):
        call(batch()[0])


def test_unknown_options_are_refused():
    call = torch.compile(net(), backend="graphrewrite", options={"rules": "dfa"})
    with pytest.raises(Exception, match="options rules are unknown"):
        call(batch()[0])


def test_the_backend_is_listed():
    assert "graphrewrite" in torch.compiler.list_backends()
    assert dynamo.OPTIONS[0] == "rule"
