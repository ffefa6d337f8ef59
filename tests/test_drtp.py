"""Direct random target projection against the formula, its certificate, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing import zoo
from helpers import assert_close, assert_golden, cotangents_of_other_blocks, eager_grads, train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*narrower than the output error.*:UserWarning")
MODELS = ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "lstm")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int = 7):
    return torch.randn(n, 4).double(), torch.randint(0, 3, (n,))


def by_hand(model, compiled, x, target, exact) -> dict[str, torch.Tensor]:
    """delta_l = -y B_l * phi'(z_l) per sample, without 1/batch; the last layer has the exact gradient."""
    expected, h = dict(exact), x
    for name in ("0", "2"):
        linear = model[int(name)]
        out = torch.tanh(h @ linear.weight.T + linear.bias)
        delta = -(target @ compiled.rule_state[f"drtp.feedback.{name}"]) * (1 - out**2)
        expected |= {f"{name}.weight": (delta.T @ h).detach(), f"{name}.bias": delta.sum(0).detach()}
        h = out
    return expected


def test_mlp_by_hand():
    model, (x, y) = net(), batch()
    compiled = gr.compile(model, "drtp", example_inputs=x, example_targets=y)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    expected = by_hand(model, compiled, x, F.one_hot(y, 3).double(), exact)
    assert_close(train_step(compiled, x, y), expected)


def test_ignored_targets_send_no_signal():
    model, (x, y) = net(), batch()
    y[2] = -100
    compiled = gr.compile(model, "drtp", example_inputs=x, example_targets=y)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    one_hot = F.one_hot(y.clamp(min=0), 3).double()
    one_hot[2] = 0
    assert_close(train_step(compiled, x, y), by_hand(model, compiled, x, one_hot, exact))


def test_regression_targets_are_projected_as_they_are():
    model, (x, _) = net(), batch()
    y = torch.randn(7, 3).double()
    compiled = gr.compile(model, "drtp", example_inputs=x, example_targets=y, loss=F.mse_loss)
    exact = eager_grads(model, F.mse_loss(model(x), y))
    assert_close(train_step(compiled, x, y), by_hand(model, compiled, x, y, exact))


def test_the_signal_scales_with_the_loss_and_not_with_the_batch():
    """`(loss * 3).backward()` triples every gradient; a doubled batch doubles the hidden ones."""
    model, (x, y) = net(), batch()
    compiled = gr.compile(model, "drtp", example_inputs=x, example_targets=y)
    grads = train_step(compiled, x, y)
    compiled.zero_grad()
    (compiled.loss(x, y) * 3).backward()
    assert_close({n: p.grad / 3 for n, p in model.named_parameters()}, grads, rtol=1e-12)
    twice = train_step(compiled, x.repeat(2, 1), y.repeat(2))
    hidden = [n for n in grads if not n.startswith("4")]
    assert_close({n: twice[n] / 2 for n in hidden}, {n: grads[n] for n in hidden}, rtol=1e-12)
    assert_close({"4.weight": twice["4.weight"]}, {"4.weight": grads["4.weight"]}, rtol=1e-12)


def test_a_target_per_token_reaches_its_token():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.mix, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, tokens):
            return self.head(torch.tanh(self.mix(self.token(tokens))))

    model, x, y = Model().double(), torch.randint(0, 8, (3, 4)), torch.randint(0, 5, (3, 4))
    compiled = gr.compile(model, "drtp", example_inputs=x, example_targets=y)
    grads = train_step(compiled, x, y)
    signal = -compiled.rule_state["drtp.feedback.token"][y]
    (expected,) = torch.autograd.grad(model.token(x), model.token.weight, signal)
    assert_close({"w": grads["token.weight"]}, {"w": expected})


def test_hidden_blocks_wait_for_nothing():
    """The certificate: no global error, no locking; and the backward of hidden blocks runs in the forward."""
    model, (x, y) = net(), batch()
    compiled = gr.compile(model, "drtp", example_inputs=x, example_targets=y)
    *hidden, last = compiled.report().certificates.blocks
    assert not any(b.global_error or b.update_locked or b.backward_locked or b.weight_transport for b in hidden)
    assert all(b.locality_radius == 0 for b in hidden)
    assert last.global_error
    stages = compiled.program().partition.stages
    products = {s for n, s in stages.items() if "mm" in str(n.target) and n.meta["gr"].role == "gradient"}
    assert products == {"forward", "backward"}
    assert not cotangents_of_other_blocks(compiled.graph("operator"))
    assert_golden(compiled.graph("operator"), "mlp_drtp")


@pytest.mark.parametrize("name", MODELS)
def test_runs_on(name):
    case = zoo.make(name)
    x, y = case.batch(4)
    compiled = gr.compile(case.model, "drtp", example_inputs=x, example_targets=y, loss=case.loss)
    grads = train_step(compiled, x, y)
    assert set(grads) == {n for n, p in case.model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in grads.values())
    assert not cotangents_of_other_blocks(compiled.graph("operator"))


def test_it_needs_the_targets():
    model, (x, y) = net(), batch()
    compiled = gr.compile(model, "drtp")
    with pytest.raises(gr.RuleError, match=r"compiled\.loss"):
        F.cross_entropy(compiled(x), y).backward()


@pytest.mark.parametrize(
    ("y", "loss", "got"),
    [
        (torch.zeros(7, 3, dtype=torch.long), lambda o, t: (o - t).square().mean(), r"torch.int64 \(7, 3\)"),
        (torch.zeros(7, 2).double(), lambda o, t: (o[:, :2] - t).square().mean(), r"torch.float64 \(7, 2\)"),
        ((torch.zeros(7).long(), torch.zeros(7).long()), lambda o, t: F.cross_entropy(o, t[0]), "2 target tensors"),
    ],
)
def test_refuses_targets_it_cannot_project(y, loss, got):
    with pytest.raises(gr.RuleError, match=got):
        gr.compile(net(), "drtp", example_inputs=batch()[0], example_targets=y, loss=loss, dynamic=None)


def test_a_single_block_is_refused():
    with pytest.raises(gr.RuleError, match="drtp needs at least two blocks"):
        gr.compile(nn.Linear(4, 3), "drtp", example_inputs=torch.randn(7, 4), example_targets=torch.zeros(7).long())
