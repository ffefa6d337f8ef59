"""Dual propagation against a loop over dyads, and against backpropagation where the two are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing import zoo
from helpers import assert_close, assert_golden, eager_grads, find, train_step


def net(act: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3)).double()


def batch():
    return torch.randn(7, 4).double(), torch.randint(0, 3, (7,))


def compiled_dual(model, x, y, rule):
    return gr.compile(model, rule, example_inputs=x, example_targets=y, blocks="layers")


def by_dyads(model, x, y, gamma: float) -> dict[str, torch.Tensor]:
    """z± of every layer, one sweep from the top: z_l± = phi((FF ± FB) / 2), FF = W (z+ + z-) + 2 b of the layer below
    as it stands, FB = W^T (z+ - z-) of the layer above; G = -(z+ - z-) / 2 gamma times the mean state below.
    """
    linears, phi = [m for m in model if isinstance(m, nn.Linear)], model[1]
    states, h = [(x, x)], x
    with torch.no_grad():
        for i, linear in enumerate(linears):
            a = h @ linear.weight.T + linear.bias
            h = phi(a) if i < len(linears) - 1 else a
            states.append((h, h))
        error = (h.softmax(-1) - F.one_hot(y, 3)) / len(x)
        states[-1] = (h - gamma * error, h + gamma * error)
        for i in (1, 0):
            plus, minus = states[i]
            drive = (plus + minus) @ linears[i].weight.T + 2 * linears[i].bias
            back = (states[i + 2][0] - states[i + 2][1]) @ linears[i + 1].weight
            states[i + 1] = (phi((drive + back) / 2), phi((drive - back) / 2))
        grads = {}
        for i in range(len(linears)):
            delta = -(states[i + 1][0] - states[i + 1][1]) / (2 * gamma)
            below = (states[i][0] + states[i][1]) / 2
            grads |= {f"{2 * i}.weight": delta.T @ below, f"{2 * i}.bias": delta.sum(0)}
    assert set(grads) == {n for n, _ in model.named_parameters()}
    return grads


@pytest.mark.parametrize("act", [nn.Tanh, nn.Softplus, nn.GELU, nn.ReLU])
@pytest.mark.parametrize("gamma", [0.5, 20.0])
def test_dyads(act, gamma):
    """Gradient by gradient; at gamma=20 the states are far from the forward's activations."""
    model, (x, y) = net(act), batch()
    grads = train_step(compiled_dual(model, x, y, f"dual_propagation{{gamma={gamma}}}"), x, y)
    assert_close(grads, by_dyads(model, x, y, gamma), rtol=1e-12)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    if act is not nn.ReLU and gamma == 20.0:
        assert (grads["0.weight"] - exact["0.weight"]).abs().max() > 1e-5
        assert (grads["4.weight"] - exact["4.weight"]).abs().max() > 1e-5  # through the mean state below


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.Identity])
def test_piecewise_linear_without_sign_flips_is_backpropagation(act):
    """Identity 7, at gamma=0.1, to the round-off of a difference of activations."""
    model, (x, y) = net(act), batch()
    for layer in (model[0], model[2]):  # half of the units well above zero, half well below
        nn.init.constant_(layer.bias, 6.0)
        layer.bias.data[::2] *= -1
    compiled = compiled_dual(model, x, y, "dual_propagation{gamma=0.1}")
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    assert_close(train_step(compiled, x, y), exact, rtol=1e-11)
    linear = any("no activation" in text for _, _, text in compiled.graph().log.entries)
    assert linear == (act is nn.Identity)


def test_smooth_activations_differ_in_second_order():
    model, (x, y) = net(nn.Tanh), batch()
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    gaps = []
    for gamma in (0.2, 0.1):
        grads = train_step(compiled_dual(model, x, y, f"dual_propagation{{gamma={gamma}}}"), x, y)
        gaps.append(max((grads[n] - exact[n]).abs().max().item() for n in exact))
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.05)


def test_without_the_mean_state_only_the_cotangents_change():
    model, (x, y) = net(nn.Tanh), batch()
    grads = train_step(compiled_dual(model, x, y, "dual_propagation{gamma=20,mean_state=false}"), x, y)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    assert_close({"w": grads["4.weight"]}, {"w": exact["4.weight"]}, rtol=1e-12)
    assert (grads["2.weight"] - exact["2.weight"]).abs().max() > 1e-3


def test_conv_net_reads_the_mean_through_views_only():
    """A flattened map is seen by the classifier as the mean of its two states."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)).double()
    x, y = torch.randn(5, 1, 6, 6).double(), torch.randint(0, 3, (5,))
    grads = train_step(compiled_dual(model, x, y, "dual_propagation{gamma=3}"), x, y)
    a = model[0](x)
    logits = model[3](torch.tanh(a).flatten(1))
    (error,) = torch.autograd.grad(F.cross_entropy(logits, y), logits, retain_graph=True)
    nudge = 3 * (error @ model[3].weight).reshape(a.shape)
    along, against = torch.tanh(a + nudge), torch.tanh(a - nudge)
    (first,) = torch.autograd.grad(a, model[0].weight, (along - against) / 6, retain_graph=True)
    expected = {"0.weight": first, "3.weight": error.T @ ((along + against) / 2).flatten(1)}
    assert_close({n: grads[n] for n in expected}, {n: g.detach() for n, g in expected.items()}, rtol=1e-12)


def test_golden_graph():
    x, y = batch()
    compiled = compiled_dual(net(nn.Tanh), x, y, "dual_propagation")
    assert_golden(compiled.graph("operator"), "mlp_dual_propagation")
    assert len(find(compiled.graph("operator"), "tanh")) == 2  # the forward is as it was


@pytest.mark.parametrize("name", ["cnn", "resnet", "bert", "gcn", "lstm"])
def test_runs_on(name):
    """A small nudge on nets of every kind: close to backpropagation, not equal where activations are smooth."""
    case = zoo.make(name)
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, y = case.batch(4)
    compiled = gr.compile(case.model, "dual_propagation", example_inputs=x, example_targets=y, loss=case.loss)
    alignment = compiled.alignment(x, y)
    assert set(alignment) == {n for n, p in case.model.named_parameters() if p.requires_grad}
    blocks = [a.cosine for a in alignment.blocks.values()]
    assert min(blocks) > 0.9


def test_an_activation_with_parameters_keeps_its_derivative():
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3)).double(), batch()
    compiled = compiled_dual(model, x, y, "dual_propagation")
    assert_close(train_step(compiled, x, y), eager_grads(model, F.cross_entropy(model(x), y)), rtol=1e-12)
    assert any("parameters of its own" in text for _, _, text in compiled.graph().log.entries)


def test_refuses_no_nudge():
    x, y = batch()
    with pytest.raises(gr.RuleError, match="gamma=0 is no nudge"):
        compiled_dual(net(nn.Tanh), x, y, "dual_propagation{gamma=0}")
