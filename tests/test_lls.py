"""`lls` against numpy and a plain PyTorch loop."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.errors import RuleError
from graphrewrite.testing import zoo
from helpers import assert_close


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(0, 3, (n,))


def waves(classes: int, width: int) -> torch.Tensor:
    """c_k[j] = sin(f_k j)."""
    rows = [[np.sin(f * j) for j in range(width)] for f in np.linspace(50, 512, classes)]
    return torch.tensor(np.array(rows))


def logits(h: torch.Tensor, basis: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return torch.stack([(h / h.norm(dim=1, keepdim=True)) @ c for c in basis], 1) / temperature


def grads_of(compiled, x, y) -> dict[str, torch.Tensor]:
    compiled.zero_grad()
    compiled.loss(x, y).backward()
    return {name: p.grad.clone() for name, p in compiled.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("modulation", ["none", "m", "mxm"])
def test_gradients_are_those_of_the_loop(modulation):
    model, (x, y) = mlp(), data()
    rule = f"lls{{modulation={modulation},temperature=0.5,square={'true' if modulation == 'm' else 'false'}}}"
    compiled = gr.compile(model, rule, example_inputs=(x,), example_targets=y, blocks="layers")
    state = compiled.rule_state
    learned = {n: s for n, s in state.items() if s.requires_grad}
    assert {n.rpartition(".")[2] for n in learned} == {"none": set(), "m": {"scale"}, "mxm": {"mix"}}[modulation]
    if modulation == "m":
        assert all(torch.equal(s, torch.ones(3).double()) for s in learned.values())
    if modulation == "mxm":
        assert all(torch.equal(s, torch.eye(3).double()) for s in learned.values())
    with torch.no_grad():
        for held in learned.values():
            held.add_(torch.randn_like(held))
    reference = copy.deepcopy(model)
    mine = {n: s.detach().clone().requires_grad_() for n, s in learned.items()}
    h, total = x, 0.0
    for name, width in (("0", 8), ("2", 7)):
        basis = waves(3, width)
        if modulation == "m":
            basis = basis.sign()
        torch.testing.assert_close(state[f"lls.head.{name}.basis"], basis, rtol=0, atol=1e-9)
        h = torch.tanh(reference[int(name)](h.detach()))
        z = logits(h, basis, 0.5)
        if modulation == "m":
            z = z * mine[f"lls.head.{name}.scale"]
        if modulation == "mxm":
            z = z @ mine[f"lls.head.{name}.mix"].t()
        total = total + F.cross_entropy(z, y)
    (total + F.cross_entropy(reference[4](h.detach()), y)).backward()
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    wanted.update({f"_graphrewrite.{n}": s.grad for n, s in mine.items()})
    before = grads_of(compiled, x, y)
    assert_close(before, wanted, rtol=1e-6)
    proved = compiled.report().certificates
    assert proved.locality_radius == 0
    assert not proved.update_locked
    with torch.no_grad():
        for p in (*model[2].parameters(), *model[4].parameters()):
            p.add_(torch.randn_like(p))
    after = grads_of(compiled, x, y)
    for name in (n for n in before if n.startswith("0.") or ".0." in n):
        assert torch.equal(before[name], after[name]), name


@pytest.mark.slow
def test_maps_are_pooled():
    case = zoo.make("cnn")
    x, y = case.batch(4)
    compiled = gr.compile(case.model, "lls{features=24}").materialize(x, y)
    compiled.eval()
    compiled.loss(x, y)
    # 6 channels of 4 x 4 are halved in turn until 24 features are left
    h = case.model.features[:4](x)
    basis = compiled.rule_state["lls.head.features.0.basis"]
    assert basis.shape == (5, 24)
    z = F.avg_pool2d(h, 2).flatten(1)
    expected = F.cross_entropy((z / z.norm(dim=1, keepdim=True)) @ basis.t(), y)
    torch.testing.assert_close(compiled.losses["features.0"], expected.detach())


def test_predict_sums_the_answers():
    model, (x, y) = mlp(), data()
    compiled = gr.compile(model, "lls{predict=sum}", example_inputs=(x,), example_targets=y, blocks="layers")
    a = torch.tanh(model[0](x))
    b = torch.tanh(model[2](a))
    expected = model[4](b) + logits(a, waves(3, 8)) + logits(b, waves(3, 7))
    torch.testing.assert_close(compiled.predict(x), expected.detach(), rtol=1e-6, atol=1e-7)


def test_only_the_modulation_is_learned_state():
    plain, learned = (gr.compile(mlp(), rule, blocks="layers") for rule in ("lls", "lls{modulation=m}"))
    assert len(list(plain.parameters())) == 6
    with pytest.raises(RuleError, match="incomplete"):
        list(learned.parameters())
    learned.materialize(*data())
    assert len(list(learned.parameters())) == 8


def test_bad_input():
    x, y = data()
    with pytest.raises(RuleError, match="modulation='mm' is unknown"):
        gr.compile(mlp(), "lls{modulation=mm}", example_inputs=(x,), example_targets=y, blocks="layers")
    compiled = gr.compile(mlp(), "lls", example_inputs=(x,), example_targets=y, blocks="layers")
    with pytest.raises(RuleError, match="class 9"):
        compiled.loss(x, torch.tensor([0, 9, 1, 2, 0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "resnet", "vit", "gpt2", "gcn"])
def test_zoo(name):
    case = zoo.make(name)
    compiled = gr.compile(case.model, "lls{modulation=mxm}", loss=case.loss).materialize(*case.batch(4))
    for size in case.sizes[:2]:
        grads = grads_of(compiled, *case.batch(size))
        assert all(g.isfinite().all() for g in grads.values())
        assert grads.keys() == {n for n, p in compiled.named_parameters() if p.requires_grad}
    proved = compiled.report().certificates
    assert proved.locality_radius == 0
    assert not proved.update_locked
