"""Target propagation against a loop written out, its identities, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite import random
from helpers import assert_close, eager_grads, train_step

SLOW = pytest.mark.slow


def net(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 2, 3),
        nn.Tanh(),
        nn.Conv2d(2, 3, 3),
        nn.Tanh(),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
    ]
    return nn.Sequential(*layers).double()


def batch(n: int = 7, shape: tuple[int, ...] = (4,)):
    torch.manual_seed(1)
    return torch.randn(n, *shape).double(), torch.randint(0, 3, (n,))


def by_hand(model, x, y, inverses, *, beta, act, iterations, rate, noise):
    """(gradients, inverses after L-DRL); random streams are numbered from the top, two per inverse."""

    def back(y, weight):
        return act(y.flatten(1) @ weight)

    blocks = [model[:2], model[2:4], model[4:]]
    h = [x]
    for block in blocks:
        h.append(block(h[-1]).detach())
    drawn, streams, learned = torch.tensor([0, 0, 0]), 0, {}
    out = h[3].clone().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(out, y), out)
    difference = {3: beta * len(x) * error}
    for i in (2, 1):
        weight = inverses[i].clone()
        for k in range(iterations):
            xi = noise * random.direction(drawn, streams + 1, h[i].shape, torch.tensor(k), "normal", torch.float64)
            zeta = noise * random.direction(
                drawn, streams + 2, h[i + 1].shape, torch.tensor(k), "normal", torch.float64
            )
            leaf = weight.clone().requires_grad_()
            base = back(h[i + 1], leaf)
            gain = (xi.flatten(1) * (back(blocks[i](h[i] + xi).detach(), leaf) - base)).sum(1).mean()
            size = (back(h[i + 1] + zeta, leaf) - base).square().sum(1).mean()
            (slope,) = torch.autograd.grad((size - 2 * gain) / noise**2, leaf)
            weight = weight - rate * slope
        streams, learned[i] = streams + 2, weight
        target = h[i + 1] - difference[i + 1]
        difference[i] = (back(h[i + 1], weight) - back(target, weight)).reshape(h[i].shape)
    grads = {}
    for i, block in enumerate(blocks):
        if i < 2:
            target = h[i + 1] - difference[i + 1]
            loss = 0.5 * (block(h[i]) - target).square().flatten(1).sum(1).mean() / beta
        else:
            loss = F.cross_entropy(block(h[i]), y)
        names = [name for name, p in model.named_parameters() if any(p is own for own in block.parameters())]
        grads |= dict(zip(names, torch.autograd.grad(loss, list(block.parameters())), strict=True))
    return grads, learned


@pytest.mark.parametrize(
    ("make", "shape", "activation", "act"),
    [
        pytest.param(net, (4,), "tanh", torch.tanh, marks=SLOW),
        pytest.param(net, (4,), "linear", lambda t: t, marks=SLOW),
        (conv, (1, 6, 6), "tanh", torch.tanh),
    ],
)
def test_targets_and_inverses_by_hand(make, shape, activation, act):
    model, (x, y) = make(), batch(shape=shape)
    rule = f"target_propagation{{activation={activation},iterations=3,beta=0.5}}"
    compiled = gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y)
    state = compiled.rule_state
    last = [name for name, _ in model.named_modules() if name][-1]
    names = {2: f"target_propagation.inverse.2.{last}", 1: "target_propagation.inverse.0.2"}
    before = {i: state[name].clone() for i, name in names.items()}
    grads, learned = by_hand(model, x, y, before, beta=0.5, act=act, iterations=3, rate=0.05, noise=0.1)
    assert_close(train_step(compiled, x, y), grads)
    assert_close({n: compiled.rule_state[n] for n in names.values()}, {n: learned[i] for i, n in names.items()})
    assert all((before[i] - learned[i]).abs().max() > 1e-4 for i in names)


def test_transposed_weights_make_it_backpropagation():
    """Identity 11, on a linear net, at any beta."""
    model, (x, y) = net(nn.Identity), batch()
    rule = "target_propagation{iterations=0,beta=0.3}"
    compiled = gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y)
    with torch.no_grad():
        compiled.rule_state["target_propagation.inverse.2.4"].copy_(model[4].weight)
        compiled.rule_state["target_propagation.inverse.0.2"].copy_(model[2].weight)
    found, exact = train_step(compiled, x, y), eager_grads(model, F.cross_entropy(model(x), y))
    assert_close(found, exact, rtol=1e-13)
    compiled.zero_grad()
    (compiled.loss(x, y) * 3).backward()
    assert_close({n: p.grad / 3 for n, p in model.named_parameters()}, exact, rtol=1e-13)


@SLOW
def test_the_reconstruction_loss_finds_the_transposed_jacobian():
    model, (x, y) = net(nn.Identity), batch(64)
    compiled = gr.compile(
        model, "target_propagation{iterations=400,rate=0.01}", blocks="layers", example_inputs=x, example_targets=y
    )
    for _ in range(3):
        train_step(compiled, x, y)
    for name, weight in (("2.4", model[4].weight), ("0.2", model[2].weight)):
        held = compiled.rule_state[f"target_propagation.inverse.{name}"]
        assert F.cosine_similarity(held.flatten(), weight.flatten(), dim=0) > 0.99


def test_certificate():
    """No weight of the model on the way back; targets come one block after the other."""
    model, (x, y) = net(), batch()
    compiled = gr.compile(model, "target_propagation", blocks="layers", example_inputs=x, example_targets=y)
    found = compiled.report().certificates
    assert not found.weight_transport
    assert [bool(b.backward_locked) for b in found.blocks] == [True, True, False]
    assert [b.locality_radius for b in found.blocks] == [2, 1, 0]
    assert all(b.global_error for b in found.blocks)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("beta=0.0", "beta > 0"),
        pytest.param("noise=0.0", "noise > 0", marks=SLOW),
        pytest.param("activation=relu", "activation='relu'", marks=SLOW),
        pytest.param("rate=0.0", "no way to learn", marks=SLOW),
    ],
)
def test_options_that_make_no_sense(options, text):
    x, y = batch()
    with pytest.raises(gr.RuleError, match=text):
        gr.compile(net(), f"target_propagation{{{options}}}", blocks="layers", example_inputs=x, example_targets=y)
