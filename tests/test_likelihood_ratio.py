"""Likelihood ratio: the formula, enumeration behind an opaque operator, quadratics, mixtures, memory, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite import random
from graphrewrite.testing.memory import equal_blocks
from helpers import assert_close, cotangents_of_other_blocks, eager_grads, train_step

RULE = "likelihood_ratio"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int = 7):
    return torch.randn(n, 6).double(), torch.randint(0, 3, (n,))


def compiled_for(model, rule, x, y, **options):
    return gr.compile(model, rule, example_inputs=x, example_targets=y, blocks="layers", **options)


def noise(stream: int, shape) -> torch.Tensor:
    return random.direction(torch.tensor([0, 0, 0]), stream, shape, None, "normal", torch.float64)


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "samples", "signs", "base", "each"),
    [
        ("", 1, (1, -1), False, True),
        ("{antithetic=false,samples=2,baseline=clean,sigma=0.3}", 2, (1,), True, True),
        pytest.param("{per_sample=never}", 1, (1, -1), False, False, marks=pytest.mark.slow),
    ],
)
def test_mlp_by_hand(options, samples, signs, base, each):
    """G_l = mean over passes of (L - b) eps_l / sigma h_(l-1)^T, the noise of all layers at once."""
    model, (x, y) = net(), batch()
    sigma = 0.3 if "0.3" in options else 0.1
    compiled = compiled_for(model, RULE + options, x, y)
    loss = compiled.loss(x, y)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    first, last = model[0], model[2]
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    def losses(answer):
        found = F.cross_entropy(answer, y, reduction="none")
        return found / 7 if each else found.mean().expand(7)

    with torch.no_grad():
        baseline = losses(model(x)) if base else 0
        for sample, sign in itertools.product(range(samples), signs):
            # the streams of a value are numbered one after the other
            eps = [noise(1 + layer * samples + sample, (7, n)) for layer, n in enumerate((5, 3))]
            hidden = torch.tanh(first(x) + sign * sigma * eps[0])
            answer = last(hidden) + sign * sigma * eps[1]
            gain = (losses(answer) - baseline).unsqueeze(1) * sign / sigma / (samples * len(signs))
            for name, h, one in (("0", x, eps[0]), ("2", hidden, eps[1])):
                expected[f"{name}.weight"] += (gain * one).T @ h
                expected[f"{name}.bias"] += (gain * one).sum(0)
            if sample == 0 and sign == 1:
                assert torch.allclose(loss, F.cross_entropy(answer, y), rtol=1e-12)
    assert_close(grads, expected)


def test_conv_net_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(4, 2, 6, 6).double(), torch.randint(0, 3, (4,))
    grads = train_step(compiled_for(model, RULE, x, y), x, y)
    eps = noise(1, (4, 3, 4, 4)), noise(2, (4, 3))
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        for sign in (1, -1):
            h = F.max_pool2d(torch.relu(model[0](x) + sign * 0.1 * eps[0]), 2).flatten(1)
            each = F.cross_entropy(model[4](h) + sign * 0.1 * eps[1], y, reduction="none") * sign / 0.1 / 4 / 2
            first, last = each.reshape(4, 1, 1, 1) * eps[0], each.unsqueeze(1) * eps[1]
            kernel = torch.einsum("bcp,bkp->ck", first.flatten(2), F.unfold(x, 3)).reshape(3, 2, 3, 3)
            parts = {"0.weight": kernel, "0.bias": first.sum((0, 2, 3)), "4.weight": last.T @ h, "4.bias": last.sum(0)}
            expected = {n: expected[n] + part for n, part in parts.items()}
    assert_close(grads, expected)


@pytest.mark.slow
def test_running_baseline():
    """The state follows the loss; the first step, with a baseline of 0, is the plain one."""
    model, (x, y) = net(), batch()
    compiled = compiled_for(model, "likelihood_ratio{baseline=running,momentum=0.75}", x, y)
    first = train_step(compiled, x, y)
    assert_close(first, train_step(compiled_for(model, RULE, x, y), x, y))
    held = compiled.rule_state["likelihood_ratio.baseline"].clone()
    loss = compiled.loss(x, y)
    assert torch.allclose(compiled.rule_state["likelihood_ratio.baseline"], 0.75 * held + 0.25 * loss.detach())


# --- what it estimates -----------------------------------------------------------------------------------------------


@torch.library.custom_op("graphrewrite_tests::opaque_sign", mutates_args=())
def opaque_sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


@opaque_sign.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Linear(2, 3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(opaque_sign(self.features(x)))


SIGMA = 0.8


def expected_loss(model, x, y) -> torch.Tensor:
    """E[L] over the noise, by enumerating what the opaque operator can give: P(s) = prod Phi(s z / sigma)."""
    z = model.features(x)
    total = torch.zeros((), dtype=x.dtype)
    for signs in itertools.product((1.0, -1.0), repeat=3):
        s = torch.tensor(signs, dtype=x.dtype)
        chance = torch.special.ndtr(s * z / SIGMA).prod(1)
        losses = F.cross_entropy(model.head(s).expand(len(x), -1), y, reduction="none")
        total = total + (chance * losses).mean()
    return total


def test_through_an_opaque_operator_against_enumeration():
    """Mixed with backpropagation behind it: both parts learn the gradient of the expected loss."""
    model = Opaque().double()
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0])
    exact = eager_grads(model, expected_loss(model, x, y))
    rule = {"features.*": f"likelihood_ratio{{sigma={SIGMA},baseline=clean,per_sample=always}}", "head": "bp"}
    copies, steps = 2000, 12
    xs, ys = x.repeat(copies, 1), y.repeat(copies)
    compiled = compiled_for(model, rule, xs, ys)
    draws = [train_step(compiled, xs, ys) for _ in range(steps)]
    for name, wanted in exact.items():
        found = torch.stack([d[name] for d in draws])
        error = found.std(0) / steps**0.5
        assert ((found.mean(0) - wanted).abs() < 5 * error + 1e-12).all(), name
        assert error.max() < 0.2 * wanted.abs().max(), name
    certificates = compiled.report().certificates
    assert not certificates["features.0"].backward_locked
    assert certificates["features.0"].update_locked


def test_backpropagation_names_the_opaque_operator():
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0])
    with pytest.raises(gr.RuleError, match=r"opaque_sign.*cannot be differentiated.*\n.*likelihood_ratio"):
        compiled_for(Opaque().double(), "bp", x, y)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["operators", "boundaries"])
def test_unbiased_on_a_quadratic(at):
    """Identity 12: the gradient of the expected loss, which noise on a quadratic makes known in closed form."""
    model, sigma = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False)).double(), 0.5
    x, y = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    # E |W_2 (z_1 + s e_1) + s e_2 - y|^2 = |W_2 z_1 - y|^2 + s^2 |W_2|^2 + a constant
    expected = F.mse_loss(model(x), y) + sigma**2 * model[1].weight.square().sum() / y.shape[1]
    exact = eager_grads(model, expected)
    xs, ys = x.repeat(20_000, 1), y.repeat(20_000, 1)
    compiled = compiled_for(model, f"likelihood_ratio{{at={at},sigma={sigma}}}", xs, ys, loss=F.mse_loss)
    draws = [train_step(compiled, xs, ys) for _ in range(100)]
    for name, wanted in exact.items():
        found = torch.stack([d[name] for d in draws])
        error = found.std(0) / 100**0.5
        assert ((found.mean(0) - wanted).abs() < 5 * error).all(), name
        assert error.max() < 0.008 * wanted.abs().max()


# --- memory, seeds ---------------------------------------------------------------------------------------------------


def test_holds_one_input_per_operator_and_pass():
    """And each sample's loss; the noise is drawn again, from the (seed, step, rank) triple."""
    width, size, depth = 16, 512, 3
    model, x, y = equal_blocks(depth, width), torch.randn(size, width), torch.randint(0, 10, (size,))
    compiled = gr.compile(model, RULE, example_inputs=x, example_targets=y)
    assert compiled.report().saved_bytes == 2 * (depth * size * width * 4 + size * 4) + 3 * 8


def test_noise_is_a_function_of_seed_step_and_rank():
    model, (x, y) = net(), batch()

    def at(compiled, step=0, rank=0):
        compiled._step, compiled._rank = step, rank
        before = torch.get_rng_state()
        grads = train_step(compiled, x, y)
        assert torch.equal(before, torch.get_rng_state())
        return grads["0.weight"]

    compiled = compiled_for(model, RULE, x, y)
    first = at(compiled)
    assert torch.equal(first, at(compiled))
    others = [at(compiled, step=1), at(compiled, rank=1), at(compiled_for(model, RULE, x, y, seed=1))]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(first, at(compiled_for(model, "likelihood_ratio{per_rank=false}", x, y), rank=1))


# --- certificate, batch-norm, losses, refusals -----------------------------------------------------------------------


def test_certificate():
    model, (x, y) = net(), batch()
    compiled = compiled_for(model, "likelihood_ratio{baseline=clean}", x, y)
    certificates = compiled.report().certificates
    assert not certificates.weight_transport
    assert not certificates.backward_locked
    assert certificates["0"].update_locked
    assert not certificates["2"].update_locked
    assert all(b.global_error for b in certificates.blocks)
    assert certificates.forward_passes == 3
    assert not cotangents_of_other_blocks(compiled.graph("operator"))


def test_batch_norm_and_losses_that_are_no_means():
    """One loss for the batch, and the reason; running statistics move once."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = batch()
    compiled = compiled_for(model, RULE, x, y)
    entries = [text for _, _, text in compiled.program().operator.log.entries]
    assert any("one loss for the whole batch" in text and "batch_norm" in text for text in entries)
    compiled.loss(x, y).backward()
    assert model[1].num_batches_tracked == 1
    summed = compiled_for(net(), RULE, x, y, loss=lambda a, t: F.cross_entropy(a, t, reduction="sum"))
    assert any("no mean over samples" in text for _, _, text in summed.program().operator.log.entries)
    squares = compiled_for(net(), RULE, x, torch.randn(7, 3).double(), loss=F.mse_loss)
    assert not any("whole batch" in text for _, _, text in squares.program().operator.log.entries)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("sigma=0", "sigma=0 perturbs nothing"),
        ("sigma=-1", "sigma=-1 perturbs nothing"),
        ("samples=0", "draws no noise"),
        ("baseline=mean", "baseline='mean' is unknown"),
    ],
)
def test_refuses_options(options, text):
    x, y = batch()
    with pytest.raises(gr.RuleError, match=text):
        compiled_for(net(), f"likelihood_ratio{{{options}}}", x, y)
