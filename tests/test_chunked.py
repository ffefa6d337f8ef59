"""Training steps in chunks of the batch: gradients of the whole, memory of a part, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.analysis.liveness import LiveBytes


class Towers(nn.Module):
    """Two encoders with a shared projection, as in contrastive learning."""

    def __init__(self, width=12):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.LayerNorm(width))
        self.right = nn.Sequential(nn.Linear(5, width), nn.Tanh())
        self.shared = nn.Linear(width, 4, bias=False)

    def forward(self, a, b, temperature):
        return self.shared(self.left(a)), self.shared(self.right(b)) * temperature


def contrastive(outputs, _targets=None):
    a, b = (F.normalize(one, dim=-1) for one in outputs)
    scores = a @ b.t() / 0.1
    labels = torch.arange(len(a))
    return F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(found, exact, tolerance=1e-12):
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert torch.allclose(found[name], gradient, rtol=tolerance, atol=tolerance), name


def towers():
    torch.manual_seed(0)
    model = Towers().double()
    inputs = (torch.randn(10, 6, dtype=torch.float64), torch.randn(10, 5, dtype=torch.float64), torch.tensor(1.5))
    return model, (*inputs[:2], inputs[2].double())


@pytest.mark.parametrize(
    ("chunk", "codec"),
    [pytest.param(1, None, marks=pytest.mark.slow), (3, None), pytest.param(5, "mask", marks=pytest.mark.slow)],
)
def test_contrastive_gradients_are_those_of_the_whole_batch(chunk, codec):
    """Against eager mode in float64; chunks of unequal sizes, two outputs, an input that is not split."""
    model, x = towers()
    other = copy.deepcopy(model)
    loss = contrastive(other(*x))
    loss.backward()
    compiled = gr.compile(model, loss=contrastive, chunk=chunk, compress=codec)
    found = compiled.loss(x, None)
    (2 * found).backward()
    assert torch.allclose(found, loss, rtol=1e-12)
    assert_near({n: g / 2 for n, g in gradients(model).items()}, gradients(other))
    # the outputs themselves, with a loss from outside and a cotangent for one of them only
    model.zero_grad()
    other.zero_grad()
    compiled(*x)[1].square().sum().backward()
    other(*x)[1].square().sum().backward()
    assert_near(gradients(model), gradients(other))


def test_gradients_of_inputs():
    model, (a, b, t) = towers()
    other = copy.deepcopy(model)
    for leaf in (a, t):
        leaf.requires_grad_()
    contrastive(other(a, b, t)).backward()
    exact = a.grad, t.grad
    a.grad = t.grad = None
    gr.compile(model, loss=contrastive, chunk=4).loss((a, b, t), None).backward()
    assert torch.allclose(a.grad, exact[0], rtol=1e-12)
    assert torch.allclose(t.grad, exact[1], rtol=1e-12)


@pytest.mark.parametrize(
    "rule", ["bp", *[pytest.param(rule, marks=pytest.mark.slow) for rule in ("dfa", "mono_forward")]]
)
def test_means_run_once(rule):
    """The weighted mean of chunk losses and gradients, for rules with a global and with a local objective."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.randint(0, 3, (11,))
    whole = gr.compile(model, rule, seed=3)
    loss = whole.loss(x, y)
    loss.backward()
    exact, named = gradients(model), whole.losses
    model.zero_grad()
    compiled = gr.compile(model, rule, seed=3, chunk=3, chunk_loss="mean")
    found = compiled.loss(x, y)
    (3 * found).backward()
    assert torch.allclose(found, loss, rtol=1e-12)
    assert_near({n: g / 3 for n, g in gradients(model).items()}, exact)
    assert compiled.losses.keys() == named.keys()
    assert all(torch.allclose(compiled.losses[name], held, rtol=1e-12) for name, held in named.items())
    with pytest.raises(gr.RuleError, match="a second backward"):
        found.backward()


def test_dropout_draws_the_same_twice():
    """The second forward of a chunk drops what the first one did: the gradient is that of the outputs."""
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 4, bias=False)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    compiled = gr.compile(model, chunk=4)
    torch.manual_seed(5)
    out = compiled(x)
    after = torch.get_rng_state()
    out.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    # the last layer is linear in its input, whose part that was dropped has no gradient: Euler's identity
    assert torch.allclose((model[2].weight.grad * model[2].weight).sum(), 2 * out.square().sum(), rtol=1e-12)


def test_hooks_of_parameters_run_once():
    model, x = towers()
    seen = []
    model.shared.weight.register_hook(lambda g: seen.append(g))
    gr.compile(model, loss=contrastive, chunk=5).loss(x, None).backward()
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["joint", pytest.param("mean", marks=pytest.mark.slow)])
def test_memory_is_that_of_a_chunk(kind):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)], nn.Linear(32, 4))
    x, y = torch.randn(512, 32), torch.randint(0, 4, (512,))
    peaks = {}
    for chunk in (None, 8):
        compiled = gr.compile(model, chunk=chunk, chunk_loss=kind, example_inputs=(x[:64],), example_targets=y[:64])
        compiled.loss(x, y).backward()
        model.zero_grad()
        with LiveBytes([*model.parameters(), x, y]) as live:
            compiled.loss(x, y).backward()
        peaks[chunk] = live.peak - sum(p.numel() * 4 for p in model.parameters())
        model.zero_grad()
    assert peaks[8] < 0.3 * peaks[None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk=0 is no number"),
        ({"chunk": True}, "chunk=True is no number"),
        ({"chunk": 2, "chunk_loss": "sum"}, "chunk_loss='sum'"),
        ({"chunk": 2, "split_backward": True}, "exclude each other"),
        ({"chunk": 2, "rule": "ff"}, "rule ff has no backward through the outputs"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(gr.RuleError, match=message):
        gr.compile(nn.Linear(4, 2), **options)


class SeesAll(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) - self.linear(x).mean(0)


def test_what_chunks_would_change_is_refused():
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    with pytest.raises(gr.RuleError, match=r"buffer '1\.running_mean'"):
        gr.compile(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), chunk=2).loss(x, y)
    with pytest.raises(gr.RuleError, match="an output of the model for a part of the batch"):
        gr.compile(SeesAll(), chunk=2).loss(x, y)
    with pytest.raises(gr.RuleError, match="the loss for a part of the batch"):
        gr.compile(
            nn.Linear(4, 3), chunk=2, chunk_loss="mean", loss=lambda o, t: F.cross_entropy(o, t, reduction="sum")
        ).loss(x, y)
    deep = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(gr.RuleError, match="the loss for a part of the batch"):  # similarities of the batch's samples
        gr.compile(deep, "local_loss{head=sim}", blocks="layers", chunk=2, chunk_loss="mean").loss(x, y)
    with pytest.raises(gr.RuleError, match="a batch of 8 cannot be split into chunk=9"):
        gr.compile(nn.Linear(4, 3), chunk=9).loss(x, y)
    with pytest.raises(gr.RuleError, match="has not one row for each"):
        gr.compile(SeesRows(), chunk=2)(x)


class SeesRows(nn.Module):
    """Returns one number for the whole batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x), x.new_ones(5)


def test_steps_of_the_whole_batch_are_refused():
    compiled = gr.compile(nn.Linear(4, 3), chunk=2)
    with pytest.raises(gr.RuleError, match="step_blocks runs the whole batch"):
        compiled.step_blocks(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64), None)
    with pytest.raises(gr.RuleError, match="zo_step runs the whole batch"):
        compiled.zo_step(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64), 0.1)


def test_evaluation_does_not_split():
    model, x = towers()
    compiled = gr.compile(model, loss=contrastive, chunk=4).eval()
    assert torch.equal(compiled.loss(x, None), contrastive(model(*x)))
