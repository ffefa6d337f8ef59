"""Straight-through and ReinMax against their formulas and by enumeration, and where they are found."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from helpers import assert_close, assert_golden, eager_grads, train_step

CLASSES = 4


class Sampler(nn.Module):
    """Logits, a one-hot vector of them, and a read-out."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.logits, self.read = nn.Linear(3, CLASSES), nn.Linear(CLASSES, 2)

    def sample(self, t):
        if self.kind == "gumbel":
            return F.gumbel_softmax(t, tau=0.7, hard=True)
        if self.kind == "noise":
            noise = -torch.empty_like(t).exponential_().log()
            return F.one_hot((t + noise).argmax(-1), CLASSES).to(t.dtype)
        if self.kind == "multinomial":
            return F.one_hot(torch.multinomial(t.softmax(-1), 1).squeeze(-1), CLASSES).to(t.dtype)
        if self.kind == "argmax":
            return F.one_hot(t.argmax(-1), CLASSES).to(t.dtype)
        if self.kind == "scatter":
            return torch.zeros_like(t).scatter(-1, t.max(-1, keepdim=True)[1], 1.0)
        return t

    def forward(self, x):
        return self.read(self.sample(self.logits(x)))


def batch(n: int = 6):
    return torch.randn(n, 3).double(), torch.randint(0, 2, (n,))


def compiled_with(model, rule, x, y, **options):
    return gr.compile(model, rule, example_inputs=x, example_targets=y, **options)


def jacobian(p, g):
    """J(p) g with the matrix written out."""
    return torch.einsum("bij,bj->bi", torch.diag_embed(p) - p[:, :, None] * p[:, None, :], g)


def by_formula(model, x, y, rule: str, tau: float, seed: int) -> dict[str, torch.Tensor]:
    """The sample as the model draws it under the seed; then the formula for its logits."""
    torch.manual_seed(seed)
    with torch.no_grad():
        logits = model.logits(x)
        sample = model.sample(logits).round()
    sample.requires_grad_()
    loss = F.cross_entropy(model.read(sample), y)
    grads = {f"read.{n}": g for n, g in eager_grads(model.read, loss).items()}
    (g,) = torch.autograd.grad(F.cross_entropy(model.read(sample), y), sample)
    if rule == "reinmax":
        half = ((logits / tau).softmax(-1) + sample) / 2
        delta = 2 * jacobian(half, g) - jacobian(logits.softmax(-1), g) / 2
        delta = delta - delta.mean(-1, keepdim=True)
    else:
        delta = jacobian((logits / tau).softmax(-1), g)
    return {**grads, "logits.weight": (delta.T @ x).detach(), "logits.bias": delta.sum(0).detach()}


@pytest.mark.parametrize("kind", ["gumbel", "noise", "multinomial", "argmax", "scatter"])
@pytest.mark.parametrize(("rule", "tau"), [("straight_through", 1.0), ("straight_through", 0.5), ("reinmax", 1.5)])
def test_formula(kind, rule, tau):
    if rule == "reinmax" and kind in ("argmax", "scatter"):
        pytest.skip("an arg max is no sample: see test_an_arg_max_is_no_sample")
    model, (x, y) = Sampler(kind).double(), batch()
    compiled = compiled_with(model, f"{rule}{{tau={tau}}}", x, y)
    torch.manual_seed(3)
    grads = train_step(compiled, x, y)
    assert_close(grads, by_formula(model, x, y, rule, tau, 3), rtol=1e-9)


def test_the_forward_is_unchanged():
    """Bit by bit, though a gumbel sample is only nearly one-hot."""
    model, (x, y) = Sampler("gumbel").double(), batch()
    compiled = compiled_with(model, "reinmax", x, y)
    torch.manual_seed(3)
    loss = compiled.loss(x, y)
    torch.manual_seed(3)
    assert torch.equal(loss, F.cross_entropy(model(x), y))


def test_reinmax_is_exact_for_quadratic_functions_on_average():
    """Identity 9, by enumeration: the expectation over all categories is the gradient of E[f], plain ST's is not."""
    theta = torch.randn(5).double()
    matrix, linear = torch.randn(5, 5).double(), torch.randn(5).double()

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(theta.clone())

        def forward(self, rows):
            t = self.theta + torch.zeros_like(rows)
            d = F.one_hot(torch.multinomial(t.softmax(-1), 1).squeeze(-1), 5).to(t.dtype)
            return torch.cat([torch.einsum("bi,ij,bj->b", d, matrix, d)[:, None] + d @ linear[:, None], d.detach()], -1)

    parameter = theta.clone().requires_grad_()
    eye = torch.eye(5).double()
    costs = torch.einsum("bi,ij,bj->b", eye, matrix, eye) + eye @ linear
    (exact,) = torch.autograd.grad((parameter.softmax(-1) * costs).sum(), parameter)
    found = {}
    for rule in ("reinmax", "straight_through"):
        model = Quadratic()
        rows = torch.zeros(1, 5).double()
        compiled = gr.compile(model, rule, example_inputs=rows, example_targets=rows, loss=lambda o, y: o[:, 0].mean())
        per_category: dict[int, torch.Tensor] = {}
        for seed in itertools.count():
            torch.manual_seed(seed)
            drawn = int(model(rows)[0, 1:].argmax())
            if drawn not in per_category:
                torch.manual_seed(seed)
                per_category[drawn] = train_step(compiled, rows, rows)["theta"]
            if len(per_category) == 5:
                break
        found[rule] = sum(theta.softmax(-1)[i] * g for i, g in per_category.items())
    assert torch.allclose(found["reinmax"], exact, rtol=0, atol=1e-14)
    assert (found["straight_through"] - exact).abs().max() > 0.05


# --- steps ---------------------------------------------------------------------------------------------------------


class Stepped(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.a, self.b, self.step = nn.Linear(3, 5), nn.Linear(5, 2), step

    def forward(self, x):
        return self.b(self.step(self.a(x)))


STEPS = {
    "sign": (torch.sign, 1),
    "round": (torch.round, 1),
    "floor": (torch.floor, 1),
    "above": (lambda t: (t > 0.1).to(t.dtype), 1),
    "below": (lambda t: (t <= 0.1).to(t.dtype), -1),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("clip", [None, 0.4])
def test_steps_pass_the_cotangent(name, clip):
    step, sign = STEPS[name]
    model, (x, y) = Stepped(step).double(), batch()
    compiled = compiled_with(model, "straight_through" if clip is None else f"straight_through{{clip={clip}}}", x, y)
    t = model.a(x)
    h = step(t).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model.b(h), y), h)
    g = sign * g if clip is None else sign * g * (t.abs() <= clip)
    weight, bias = torch.autograd.grad(t, [model.a.weight, model.a.bias], g)
    grads = train_step(compiled, x, y)
    assert_close({"w": grads["a.weight"], "b": grads["a.bias"]}, {"w": weight, "b": bias}, rtol=1e-12)


def test_the_models_own_straight_through_form_is_left_alone():
    model, (x, y) = Stepped(lambda t: t + (torch.round(t) - t).detach()).double(), batch()
    with pytest.warns(UserWarning, match="straight through already"):
        compiled = compiled_with(model, "straight_through", x, y)
    assert_close(train_step(compiled, x, y), eager_grads(model, F.cross_entropy(model(x), y)), rtol=1e-12)


# --- with other rules ----------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.sign(self.a(x))
        d = F.gumbel_softmax(self.b(h), hard=True)
        return self.c(d)


def test_combines_with_direct_feedback_alignment():
    """DFA cuts behind the sample: the projected error is what the sample's derivative gets."""
    model, (x, y) = Deep().double(), batch()
    compiled = compiled_with(model, "dfa", x, y, passes=["reinmax", 'straight_through{only=["a",""]}'])
    torch.manual_seed(3)
    grads = train_step(compiled, x, y)
    with torch.no_grad():
        t = model.a(x)
        h = torch.sign(t)
        logits = model.b(h)
        torch.manual_seed(3)
        d = F.gumbel_softmax(logits, hard=True)
        error = (model.c(d).softmax(-1) - F.one_hot(y, 2)) / len(x)
        g = error @ compiled.rule_state["dfa.feedback.b"]
        half = (logits.softmax(-1) + d.round()) / 2
        delta = 2 * jacobian(half, g) - jacobian(logits.softmax(-1), g) / 2
        delta -= delta.mean(-1, keepdim=True)
        first = error @ compiled.rule_state["dfa.feedback.a"]
    assert_close({"w": grads["b.weight"]}, {"w": delta.T @ h}, rtol=1e-9)
    assert_close({"w": grads["a.weight"]}, {"w": first.T @ x}, rtol=1e-9)


def test_as_a_rule_it_acts_on_its_blocks_only():
    model, (x, y) = Deep().double(), batch()
    compiled = compiled_with(model, {"b": "reinmax", "*": "bp"}, x, y)
    grads = train_step(compiled, x, y)
    assert grads["b.weight"].abs().max() > 0
    assert grads["a.weight"].abs().max() == 0  # the sign in front keeps its derivative, zero


def test_the_rule_is_short_for_the_pass():
    model, (x, y) = Sampler("gumbel").double(), batch()
    one, two = compiled_with(model, "reinmax", x, y), compiled_with(model, "bp", x, y, passes=["reinmax"])
    grads = []
    for compiled in (one, two):
        torch.manual_seed(5)
        grads.append(train_step(compiled, x, y))
    assert_close(*grads, rtol=1e-15)


def test_through_an_outside_loss():
    model, (x, y) = Sampler("multinomial").double(), batch()
    compiled = compiled_with(model, "straight_through", x, y)
    torch.manual_seed(3)
    expected = train_step(compiled, x, y)
    compiled.zero_grad()
    torch.manual_seed(3)
    F.cross_entropy(compiled(x), y).backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected, rtol=1e-12)


def test_golden_graph():
    model, (x, y) = Sampler("gumbel"), batch()
    assert_golden(compiled_with(model, "reinmax", x.float(), y).graph("operator"), "gumbel_reinmax")


# --- not found, bad input ------------------------------------------------------------------------------------------


def log(compiled) -> str:
    return "\n".join(text for _, _, text in compiled.graph().log.entries)


def test_an_arg_max_is_no_sample():
    model, (x, y) = Sampler("argmax").double(), batch()
    with pytest.warns(UserWarning, match="reinmax changes nothing in this model: an arg max without noise"):
        compiled_with(model, "reinmax", x, y)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (
            lambda t: F.one_hot(torch.multinomial(t.sigmoid(), 1).squeeze(-1), CLASSES).to(t.dtype),
            "no softmax of logits",
        ),
        (lambda t: F.one_hot(t.sum(-1).long().clamp(0, 3), CLASSES).to(t.dtype), "no argmax, max or multinomial"),
        (lambda t: F.one_hot(t.detach().argmax(-1), CLASSES).to(t.dtype), "do not depend on a parameter"),
        (lambda t: t, "found nothing"),
    ],
)
def test_the_reason_for_not_firing(sample, reason):
    model, (x, y) = Sampler("custom").double(), batch()
    model.sample = sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = compiled_with(model, "straight_through", x, y)
    assert reason in log(compiled)
    torch.manual_seed(3)
    grads = train_step(compiled, x, y)
    torch.manual_seed(3)
    assert_close(grads, eager_grads(model, F.cross_entropy(model(x), y)), rtol=1e-12)


def test_a_sample_that_the_model_returns_is_refused():
    class Returns(Sampler):
        def forward(self, x):
            d = self.sample(self.logits(x))
            return self.read(d), d

    model, (x, y) = Returns("gumbel").double(), batch()
    with pytest.raises(gr.RuleError, match="whose derivative is to be replaced"):
        compiled_with(model, "reinmax", x, y, loss=lambda o, t: F.cross_entropy(o[0], t))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("reinmax{tau=0.5}", "tau >= 1"),
        ("straight_through{tau=0}", "positive tau"),
        ("straight_through{clip=-1}", "positive tau and clip"),
        ('straight_through{only=["nowhere"]}', "matches no module"),
    ],
)
def test_bad_options(rule, message):
    x, y = batch()
    with pytest.raises(gr.RuleError, match=message):
        compiled_with(Sampler("gumbel").double(), rule, x, y)
