"""Forward gradient: JVPs against autograd, the formula, the variance law, memory, seeds and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphrewrite as gr
from graphrewrite import random
from graphrewrite.graph.nodes import Loss, NodeInfo, Role, Tap
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import call
from graphrewrite.testing.memory import equal_blocks, gradient_bytes, measured_peak
from helpers import (
    Cube,
    assert_close,
    assert_equal,
    assert_golden,
    cotangents_of_other_blocks,
    eager_grads,
    joint_graph,
    run,
    train_step,
)

WEIGHTS = "forward_gradient{perturb=weights}"
COUNTER = torch.tensor([0, 0, 0])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def batch(n: int = 7):
    return torch.randn(n, 6).double(), torch.randint(0, 3, (n,))


def compiled_for(model, rule, x, y, **options):
    return gr.compile(model, rule, example_inputs=x, example_targets=y, blocks="layers", **options)


def noise(stream: int, shape, counter=COUNTER) -> torch.Tensor:
    return random.direction(counter, stream, shape, None, "normal", torch.float64)


# --- push_forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["mlp", pytest.param("gcn", marks=pytest.mark.slow), pytest.param("cnn", marks=pytest.mark.slow), "resnet", "vit"],
)
def test_push_forward_is_the_jacobian_vector_product(name):
    """Against autograd's gradient times the same tangents, through batch-norm, dropout, attention and scatters."""
    case = zoo.make(name)
    case.model.double()
    x, y = case.batch(4)
    x = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, x)
    graph = joint_graph(case.model, x, y, loss=case.loss)
    graph.drop_backward()
    tangents = {
        node: graph.emit(torch.ops.aten.cos.default, (node,), like=NodeInfo(role=Role.TANGENT))
        for node in graph.parameters().values()
        if node.users
    }
    graph.tap(graph.push_forward(tangents)[graph.outputs[Loss()]], "slope")
    graph.prune()
    torch.manual_seed(1)
    slope = run(graph, case.model, x, y)[Tap("slope")]
    torch.manual_seed(1)
    loss = (case.loss or gr.default_loss)(call(case.model, x), y)
    expected = sum((g * torch.cos(dict(case.model.named_parameters())[n])).sum() for n, g in
                   eager_grads(case.model, loss).items())  # fmt: skip
    assert abs(slope - expected) <= 1e-12 * max(abs(expected), 1)


class Cubic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(Cube.apply(self.first(x)))


def test_operators_without_forward_mode_go_through_their_vjp():
    """A custom function has a backward only: it is linear in the cotangent, so it can be transposed."""
    model, (x, y) = Cubic().double(), batch()
    grads = train_step(compiled_for(model, WEIGHTS, x, y), x, y)
    assert_close(grads, by_hand_weights(model, x, y, [1]))


# --- the formulas ----------------------------------------------------------------------------------------------------


def by_hand_weights(model, x, y, firsts) -> dict[str, torch.Tensor]:
    """The mean of (dL . v) v, the slope by backpropagation.

    The streams of a tangent are numbered from `first` on, in the order of parameters.
    """
    named = {n: p.detach() for n, p in model.named_parameters()}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    for first in firsts:
        v = {n: noise(first + i, p.shape) for i, (n, p) in enumerate(named.items())}
        exact = eager_grads(model, F.cross_entropy(model(x), y))
        slope = sum((exact[n] * v[n]).sum() for n in v)
        total = {n: t + slope * v[n] / len(firsts) for n, t in total.items()}
    return total


@pytest.mark.parametrize("tangents", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_weights_by_hand(tangents):
    model, (x, y) = net(), batch()
    rule = f"forward_gradient{{perturb=weights,tangents={tangents}}}"
    grads = train_step(compiled_for(model, rule, x, y), x, y)
    assert_close(grads, by_hand_weights(model, x, y, [1 + 6 * k for k in range(tangents)]))


@pytest.mark.parametrize("per_sample", ["auto", "never"])
def test_activities_by_hand(per_sample):
    """delta_l = (sum_k u_k . dL/dz_k) u_l, with a derivative for each sample or one for all."""
    model, (x, y) = net(), batch()
    rule = f"forward_gradient{{per_sample={per_sample}}}"
    grads = train_step(compiled_for(model, rule, x, y), x, y)
    u = [noise(1 + i, (7, n)) for i, n in enumerate((5, 4, 3))]

    def losses(*moves):
        h = x
        for i, move in zip((0, 2, 4), moves, strict=True):
            z = model[i](h) + move
            h = model[i + 1](z) if i < 4 else z
        each = F.cross_entropy(h, y, reduction="none")
        return each if per_sample == "auto" else each.sum()

    _, slope = jvp(losses, tuple(torch.zeros_like(one) for one in u), tuple(u))
    slope = slope.detach().reshape(-1, 1) / 7
    hidden = [x, torch.tanh(model[0](x))]
    hidden.append(torch.relu(model[2](hidden[1])))
    expected = {}
    for name, one, h in zip(("0", "2", "4"), u, hidden, strict=True):
        delta = slope * one
        expected |= {f"{name}.weight": (delta.T @ h).detach(), f"{name}.bias": delta.sum(0)}
    assert_close(grads, expected)


@pytest.mark.slow
def test_conv_net_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(4, 2, 6, 6).double(), torch.randint(0, 3, (4,))
    grads = train_step(compiled_for(model, "forward_gradient", x, y), x, y)
    u = noise(1, (4, 3, 4, 4)), noise(2, (4, 3))

    def losses(first, second):
        h = F.max_pool2d(torch.tanh(model[0](x) + first), 2).flatten(1)
        return F.cross_entropy(model[4](h) + second, y, reduction="none")

    slope = jvp(losses, tuple(torch.zeros_like(one) for one in u), u)[1].detach() / 4
    deltas = slope.reshape(4, 1, 1, 1) * u[0], slope.reshape(4, 1) * u[1]
    with torch.no_grad():
        h = F.max_pool2d(torch.tanh(model[0](x)), 2).flatten(1)
    kernel = torch.einsum("bcp,bkp->ck", deltas[0].flatten(2), F.unfold(x, 3)).reshape(3, 2, 3, 3)
    expected = {"0.weight": kernel, "0.bias": deltas[0].sum((0, 2, 3))}
    assert_close(grads, expected | {"4.weight": deltas[1].T @ h, "4.bias": deltas[1].sum(0)})


@pytest.mark.slow
def test_blocks_in_front_get_the_estimate_as_their_cotangent():
    """{first: bp, rest: forward gradient}: the first layer pulls back delta_2, whose mean is the exact cotangent."""
    model, (x, y) = net(), batch()
    rule = {"0": "bp", "*": "forward_gradient"}
    grads = train_step(compiled_for(model, rule, x, y), x, y)
    delta = grads["2.bias"]
    one = train_step(compiled_for(model, rule, x[:1], y[:1], dynamic=None), x[:1], y[:1])
    h = torch.tanh(model[0](x[:1]))
    cotangent = (one["2.bias"] @ model[2].weight) * (1 - h[0] ** 2)
    assert_close({"b": one["0.bias"]}, {"b": cotangent.detach()})
    assert delta.abs().max() > 0


@pytest.mark.parametrize("separate", [False, True])
def test_local_guesses_by_hand(separate):
    """G = (dL . v) v / |v|^2 along the gradient of the heads' losses; the last block and the heads learn exactly."""
    model, (x, y) = net(), batch()
    rule = f"forward_gradient{{perturb=weights,guess=local,separate={str(separate).lower()}}}"
    compiled = compiled_for(model, rule, x, y)
    heads = {n.rpartition(".head.")[2]: p for n, p in compiled.named_parameters() if ".head." in n}
    with torch.no_grad():
        for p in heads.values():  # at zero, the heads' first value, there is nothing to guess
            p.copy_(torch.randn_like(p))
    (3 * compiled.loss(x, y)).backward()
    hidden = [x, torch.tanh(model[0](x))]
    hidden.append(torch.relu(model[2](hidden[1].detach())))
    guesses = {}
    for name, h in (("0", hidden[1]), ("2", hidden[2])):
        local = F.cross_entropy(F.linear(h, heads[f"{name}.weight"], heads[f"{name}.bias"]), y)
        params = [model[int(name)].weight, model[int(name)].bias]
        found = torch.autograd.grad(local, [*params, heads[f"{name}.weight"]])
        guesses |= dict(zip((f"{name}.weight", f"{name}.bias"), found, strict=False))
        assert_close({"head": heads[f"{name}.weight"].grad}, {"head": 3 * found[2]})
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    expected = {n: exact[n] for n in ("4.weight", "4.bias")}
    for group in [["0.weight", "0.bias"], ["2.weight", "2.bias"]] if separate else [list(guesses)]:
        slope = sum((exact[n] * guesses[n]).sum() for n in group)
        square = sum(guesses[n].square().sum() for n in group)
        expected |= {n: slope * guesses[n] / square for n in group}
    assert_close({n: p.grad / 3 for n, p in model.named_parameters()}, expected)
    assert compiled.report().certificates["0"].update_locked


@pytest.mark.slow
def test_there_is_nothing_to_guess_for_frozen_blocks():
    model, (x, y) = net(), batch()
    for layer in (0, 2):
        model[layer].requires_grad_(False)
    found = train_step(compiled_for(model, "forward_gradient{perturb=weights,guess=local}", x, y), x, y)
    assert_close(found, eager_grads(model, F.cross_entropy(model(x), y)))


# --- unbiased, and how noisy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "law", "draws"),
    [
        ("perturb=weights", 12, 400),
        pytest.param("perturb=weights", 12, 10_000, marks=pytest.mark.slow),
        pytest.param("perturb=weights,tangents=3", 4, 4000, marks=pytest.mark.slow),
        pytest.param("perturb=weights,distribution=signs", 10, 4000, marks=pytest.mark.slow),
    ],
)
def test_weights_are_unbiased_with_relative_variance_d_plus_one(options, law, draws):
    """Identity 12: E|G' - G|^2 = (d + 1) / K |G|^2 for normal tangents, (d - 1) / K for signs."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1), nn.Linear(1, 1)).double()
    assert sum(p.numel() for p in model.parameters()) == 11
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    check_law(model, f"forward_gradient{{{options}}}", x, y, law, list(dict(model.named_parameters())), draws)


@pytest.mark.slow
def test_activities_are_unbiased_with_relative_variance_d_plus_one():
    """At the units, whose cotangents a single sample's bias gradients are: d is the number of units."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(1, 2).double(), torch.randn(1, 2).double()
    check_law(model, "forward_gradient", x, y, 6 + 1, ["0.bias", "2.bias"], 4000, dynamic=None)


def check_law(model, rule, x, y, law, names, draws, **options):
    compiled = compiled_for(model, rule, x, y, loss=F.mse_loss, **options)
    exact = torch.cat([g.flatten() for n, g in eager_grads(model, F.mse_loss(model(x), y)).items() if n in names])
    found = torch.empty(draws, len(exact), dtype=torch.float64)
    named = dict(model.named_parameters())
    for i in range(draws):
        compiled.zero_grad()
        compiled.loss(x, y).backward()
        found[i] = torch.cat([named[n].grad.flatten() for n in names])
    error = found.std(0) / draws**0.5
    assert ((found.mean(0) - exact).abs() < 5 * error).all()
    ratios = (found - exact).square().sum(1) / exact.square().sum()
    margin = 4 * float(ratios.std()) / draws**0.5
    # the interval is narrow enough for the test to be able to fail
    assert margin < 10 / draws**0.5 * law
    assert abs(float(ratios.mean()) - law) < margin


# --- memory ----------------------------------------------------------------------------------------------------------

WIDTH, BATCH = 16, 512
UNIT = WIDTH * BATCH * 4
TRIPLE = 3 * 8
"""The (seed, step, rank) triple, from which the noise is drawn again."""


def at_depth(rule: str, depth: int):
    torch.manual_seed(0)
    model, x, y = equal_blocks(depth, WIDTH), torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))
    compiled = gr.compile(model, rule, verify="off")
    compiled.loss(x, y).backward()
    return compiled, measured_peak(compiled, x, y) - gradient_bytes(model)


def test_perturbed_weights_hold_no_activation_between_blocks():
    shallow, low = at_depth(WEIGHTS, 1)
    deep, high = at_depth(WEIGHTS, 3)
    assert deep.report().saved_bytes == shallow.report().saved_bytes == 4 + TRIPLE  # the directional derivative
    assert high - low < UNIT


def test_perturbed_activities_hold_one_input_per_operator():
    """And the derivative of each sample; the noise is drawn again."""
    compiled, _ = at_depth("forward_gradient", 2)
    # the input of the first operator is the user's: it is referenced, not stored
    assert compiled.report().saved_bytes == 2 * UNIT + BATCH * 4 + TRIPLE


@pytest.mark.parametrize("rule", ["forward_gradient", "likelihood_ratio{baseline=clean}"])
def test_replay_changes_no_bit(rule):
    """The forward runs again in the backward, noise and all; dropout's mask stays saved."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    replayed = rule.replace("}", ",replay=true}") if "{" in rule else rule + "{replay=true}"
    found, saved = [], []
    for text in (rule, replayed):
        compiled = compiled_for(model, text, x, y)
        saved.append(compiled.report().saved_bytes)
        torch.manual_seed(5)
        found.append(train_step(compiled, x, y))
    assert_equal(*found)
    assert saved[1] <= saved[0] - 7 * 8 * 4


@pytest.mark.parametrize("rule", ["forward_gradient", pytest.param("likelihood_ratio", marks=pytest.mark.slow)])
def test_replay_holds_no_input_and_its_peak_does_not_grow(rule):
    shallow, low = at_depth(rule + "{replay=true}", 2)
    deep, high = at_depth(rule + "{replay=true}", 4)
    passes = 1 if rule == "forward_gradient" else 2
    assert deep.report().saved_bytes == shallow.report().saved_bytes == passes * BATCH * 4 + TRIPLE
    assert high - low < 0.1 * UNIT


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_step_and_rank():
    model, (x, y) = net(), batch()

    def at(compiled, step=0, rank=0):
        compiled._step, compiled._rank = step, rank
        before = torch.get_rng_state()
        grads = train_step(compiled, x, y)
        assert torch.equal(before, torch.get_rng_state())
        return grads["0.weight"]

    compiled = compiled_for(model, "forward_gradient", x, y)
    first = at(compiled)
    assert torch.equal(first, at(compiled))
    others = [at(compiled, step=1), at(compiled, rank=1), at(compiled_for(model, "forward_gradient", x, y, seed=1))]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(first, at(compiled_for(model, "forward_gradient{per_rank=false}", x, y), rank=1))


# --- certificate, graph, options -------------------------------------------------------------------------------------


def test_certificate_and_graph():
    """Nothing comes back: no weight is transported, no backward waits; the updates wait for the loss."""
    model, (x, y) = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), batch()
    for rule in (WEIGHTS, "forward_gradient"):
        compiled = compiled_for(model, rule, x, y)
        certificates = compiled.report().certificates
        assert not certificates.weight_transport
        assert not certificates.backward_locked
        assert certificates.backward_depth == 1
        assert all(b.global_error for b in certificates.blocks)
        assert certificates["0"].update_locked
        assert not certificates["2"].update_locked
        assert not cotangents_of_other_blocks(compiled.graph("operator"))
    assert_golden(compiled.graph("operator"), "mlp_forward_gradient")


def test_batch_norm_makes_samples_meet():
    """Then one directional derivative stands for the batch, and explain says why."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch()
    compiled = compiled_for(model, "forward_gradient", x, y)
    entries = [text for _, _, text in compiled.program().operator.log.entries]
    assert any("whole batch" in text and "batch_norm" in text for text in entries)
    layer_norm = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    entries = compiled_for(layer_norm, "forward_gradient", x, y).program().operator.log.entries
    assert not any("whole batch" in text for _, _, text in entries)


def test_too_few_tangents_for_the_width():
    model, (x, y) = net(), batch()
    with pytest.warns(UserWarning, match=r"perturbs 74 parameters at once with 2 tangents: .* is 37.5 times"):
        compiled_for(model, "forward_gradient{perturb=weights,limit=10,tangents=2}", x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled_for(model, "forward_gradient{limit=13}", x, y)


@torch.library.custom_op("graphrewrite_tests::opaque_step", mutates_args=())
def opaque_step(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype)


@opaque_step.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Opaque(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 5), nn.Linear(5, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


@pytest.mark.parametrize(
    ("between", "text"),
    [
        (opaque_step, r"graphrewrite_tests\.opaque_step\.default has no JVP"),
        (lambda h: F.rrelu(h, training=True), r"aten\.rrelu.* has no JVP: it draws random numbers"),
    ],
)
def test_refuses_operators_without_a_jvp(between, text):
    x, y = batch()
    with pytest.raises(gr.RuleError, match=text):
        compiled_for(Opaque(between).double(), "forward_gradient", x, y)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("tangents=0", "no direction"),
        ("perturb=noise", "perturb='noise' is unknown"),
        ("perturb=weights,replay=true", "leave nothing to save"),
        ("guess=local", "a local guess is one direction for the weights"),
    ],
)
def test_refuses_options(options, text):
    x, y = batch()
    with pytest.raises(gr.RuleError, match=text):
        compiled_for(net(), f"forward_gradient{{{options}}}", x, y)
