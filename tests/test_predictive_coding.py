"""Predictive coding against loops written out, its identities, its certificate, and what it refuses."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.graph.loop import is_loop
from graphrewrite.testing.rules import assert_locality_is_certified
from helpers import assert_close, eager_grads, train_step

SLOW = pytest.mark.slow


def mlp() -> nn.Sequential:
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def conv() -> nn.Sequential:
    layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def parts(model: nn.Sequential) -> list[nn.Sequential]:
    """The layers with parameters, each with what follows it."""
    found: list[list[nn.Module]] = []
    for module in model:
        if any(True for _ in module.parameters()):
            found.append([])
        found[-1].append(module)
    return [nn.Sequential(*group) for group in found]


def batch(model: nn.Sequential, n: int = 5):
    torch.manual_seed(1)
    shape = (n, 4) if isinstance(model[0], nn.Linear) else (n, 1, 6, 6)
    return torch.randn(shape).double(), torch.randint(0, 3, (n,))


def by_hand(model, x, y, *, variant, steps, size, beta=None, rate=None) -> dict[str, torch.Tensor]:
    """The loop as in the papers, layer by layer, on a copy; with `rate`, the weights move in every step (iPC)."""
    model = copy.deepcopy(model)
    names = {p: n for n, p in model.named_parameters()}
    fs, beta = parts(model), beta or len(x)
    top = fs.pop()
    v = [x]
    for f in fs:
        v.append(f(v[-1]).detach())
    at = [h.clone() for h in v]
    predictions = [h.clone() for h in v]

    def energy_gradients(v):
        """(errors, what comes back to each state, weight gradients) at v; fixed: predictions and J of the forward."""
        read = at if variant == "fixed" else v
        errors, back, grads = [None], [torch.zeros_like(h) for h in v], {}
        for i, f in enumerate(fs):
            held = read[i].detach().requires_grad_()
            out = f(held)
            error = (predictions[i + 1] if variant == "fixed" else out.detach()) - v[i + 1]
            errors.append(error)
            found = torch.autograd.grad(out, [held, *f.parameters()], error)
            back[i] = back[i] + found[0]
            grads |= {names[p]: g / beta for p, g in zip(f.parameters(), found[1:], strict=True)}
        held = read[-1].detach().requires_grad_()
        found = torch.autograd.grad(beta * F.cross_entropy(top(held), y), [held, *top.parameters()])
        back[-1] = back[-1] + found[0]
        grads |= {names[p]: g / beta for p, g in zip(top.parameters(), found[1:], strict=True)}
        return errors, back, grads

    moved = {n: torch.zeros_like(p) for p, n in names.items()}
    for _ in range(steps):
        errors, back, grads = energy_gradients(v)
        v = [x] + [v[i] + size * (errors[i] - back[i]) for i in range(1, len(v))]
        if rate is not None:
            with torch.no_grad():
                for p, n in names.items():
                    p -= rate * grads[n]
                    moved[n] += grads[n]
    return moved if rate is not None else energy_gradients(v)[2]


@pytest.mark.parametrize("make", [mlp, pytest.param(conv, marks=SLOW)])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("predictive_coding{steps=7}", {"variant": "strict", "steps": 7, "size": 0.1}),
        pytest.param(
            "predictive_coding{steps=3,step_size=0.3,nudge=0.7}",
            {"variant": "strict", "steps": 3, "size": 0.3, "beta": 0.7},
            marks=SLOW,
        ),
        pytest.param(
            "predictive_coding{variant=fixed,steps=6}", {"variant": "fixed", "steps": 6, "size": 0.1}, marks=SLOW
        ),
        pytest.param(
            "predictive_coding{incremental=true,rate=0.05,steps=5}",
            {"variant": "strict", "steps": 5, "size": 0.1, "rate": 0.05},
            marks=SLOW,
        ),
    ],
)
def test_the_loop_by_hand(make, rule, options):
    model = make()
    x, y = batch(model)
    compiled = gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y)
    assert_close(train_step(compiled, x, y), by_hand(model, x, y, **options), rtol=1e-9)
    assert set(compiled.losses) == {"task", *[str(i) for i, m in enumerate(model[:-1]) if list(m.parameters())]}
    assert compiled.losses["task"] == F.cross_entropy(model(x), y)
    other, targets = batch(model, 3)
    assert_close(train_step(compiled, other, targets), by_hand(model, other, targets, **options), rtol=1e-9)


@SLOW
def test_incremental_gradients_are_what_sgd_has_to_move():
    """SGD with the inner rate ends where the inner weights ended."""
    model = mlp()
    x, y = batch(model)
    compiled = gr.compile(
        model,
        "predictive_coding{incremental=true,rate=0.05,steps=1}",
        blocks="layers",
        example_inputs=x,
        example_targets=y,
    )
    once = gr.compile(model, "predictive_coding{steps=0}", blocks="layers", example_inputs=x, example_targets=y)
    # after one step from the forward's activations only the last layer has an error: it moves as in plain learning
    assert_close(train_step(compiled, x, y), train_step(once, x, y))


# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sweeps"),
    [(mlp, 1), *[pytest.param(mlp, n, marks=SLOW) for n in (0, 2, 3)], pytest.param(conv, 1, marks=SLOW)],
)
def test_fixed_predictions_with_step_size_one_are_backpropagation_layer_by_layer(make, sweeps):
    """Identity 1: n sweeps make the top n layers exact and leave the others at zero."""
    model = make()
    x, y = batch(model)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    layers = [name for name, m in model.named_children() if list(m.parameters())]
    rule = f"predictive_coding{{variant=fixed,step_size=1.0,steps={sweeps}}}"
    found = train_step(gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y), x, y)
    for depth, layer in enumerate(reversed(layers)):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if depth <= sweeps:
                assert (found[name] - exact[name]).abs().max() < 1e-15
            else:
                assert not found[name].any()


@SLOW
@pytest.mark.parametrize("variant", ["exact", "fixed,step_size=0.1,steps=200"])
def test_fixed_predictions_go_to_backpropagation(variant):
    """Identity 2 (2e-7), and the exact variant to rounding."""
    model = mlp()
    x, y = batch(model)
    rule = f"predictive_coding{{variant={variant}}}"
    found = train_step(gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y), x, y)
    assert_close(found, eager_grads(model, F.cross_entropy(model(x), y)), rtol=1e-14 if variant == "exact" else 2e-7)


class Dense(nn.Module):
    """A class per pixel, whose loss reads the input's sizes; a skip around the pooling that its own block ends in."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.up = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.tanh(self.down(x))
        c = F.interpolate(torch.tanh(self.middle(F.avg_pool2d(a, 2))), scale_factor=2.0)
        return self.up(torch.cat([c, a], 1)).movedim(1, -1)


@pytest.mark.parametrize("variant", ["exact", pytest.param("fixed,step_size=1.0,steps=4", marks=SLOW)])
def test_skips_and_a_loss_per_pixel(variant):
    model = Dense().double()
    x, y = torch.randn(2, 1, 4, 4).double(), torch.randint(0, 3, (2, 4, 4))
    loss = lambda out, y: F.cross_entropy(out.reshape(-1, 3), y.reshape(-1))  # noqa: E731
    rule = f"predictive_coding{{variant={variant}}}"
    compiled = gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y, loss=loss)
    assert_close(train_step(compiled, x, y), eager_grads(model, loss(model(x), y)), rtol=1e-12)


@SLOW
def test_a_weak_nudge_is_backpropagation_in_the_limit():
    model = mlp()
    x, y = batch(model)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    errors = []
    for nudge in (1e-2, 1e-3):
        rule = f"predictive_coding{{nudge={nudge},steps=400,step_size=0.2}}"
        found = train_step(gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y), x, y)
        errors.append(max((found[n] - exact[n]).abs().max().item() for n in exact))
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)


class Chain(nn.Module):
    """y = W x, with a frozen identity on top, so that W x is a hidden activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, outputs, bias=False)
        self.last = nn.Linear(outputs, outputs, bias=False)
        self.last.weight.requires_grad_(False)
        nn.init.eye_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def test_inference_learning_is_implicit_sgd():
    """Settled with nudge a |x|^2, one sample's gradient times a is the step of argmin L(W') + |W' - W|^2 / 2a."""
    model, a = Chain(4, 3).double(), 0.3
    x, y = torch.randn(1, 4).double(), torch.randn(1, 3).double()
    weight = model.first.weight.detach().clone()

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 0.5 * (out - target).square().sum()

    squared = x.square().sum().item()
    rule = f"predictive_coding{{nudge={a * squared},steps=400,step_size=0.3}}"
    compiled = gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y, loss=loss)
    moved = weight - a * train_step(compiled, x, y)["first.weight"]
    implicit = weight + a / (1 + a * squared) * (y - x @ weight.T).T @ x
    assert_close({"w": moved}, {"w": implicit}, rtol=1e-12)
    # the implicit step solves W' = W - a dL/dW(W'); backpropagation's takes the slope at W
    assert_close({"w": moved}, {"w": weight - a * (x @ moved.T - y).T @ x}, rtol=1e-12)
    explicit = weight - a * (x @ weight.T - y).T @ x
    assert (moved - explicit).abs().max() > 1e-2


# --- graph, certificate --------------------------------------------------------------------------------------------


def test_the_graph_is_as_large_for_many_steps_as_for_few():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch(model)
    sizes = []
    for steps in (2, 100):
        compiled = gr.compile(
            model, f"predictive_coding{{steps={steps}}}", blocks="layers", example_inputs=x, example_targets=y
        )
        operator, aten = compiled.graph("operator"), compiled.graph("aten")
        assert sum(is_loop(n) for n in operator.nodes) == sum(is_loop(n) for n in aten.nodes) == 1
        sizes.append((len(operator.graph.nodes), len(aten.graph.nodes), len(str(operator).splitlines())))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "rule", ["predictive_coding{steps=4}", pytest.param("predictive_coding{incremental=true,steps=4}", marks=SLOW)]
)
def test_certificate(rule):
    """Errors come through the next block's weights and derivative, and settling waits for the blocks behind."""
    model = mlp()
    x, y = batch(model)
    compiled = gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y)
    found = compiled.report().certificates
    # the last block, too: the settled activations it reads have been moved through the weights behind them
    assert all(b.weight_transport for b in found.blocks)
    assert [b.locality_radius for b in found.blocks] == [3, 2, 1, 0]
    assert [bool(b.backward_locked) for b in found.blocks] == [True, True, True, False]
    assert found.global_error
    # the model's own, four in the loop, one at the settled activations
    assert found.forward_passes == 6


@SLOW
@pytest.mark.parametrize("rule", ["predictive_coding{steps=4}", "predictive_coding{incremental=true,steps=4}"])
def test_locality_is_as_certified(rule):
    model = mlp()
    assert_locality_is_certified(model, rule, *batch(model), blocks="layers")


@SLOW
def test_energies_fall_while_activations_settle():
    model = mlp()
    x, y = batch(model)
    total = []
    for steps in (1, 60):
        compiled = gr.compile(
            model, f"predictive_coding{{steps={steps},nudge=0.5}}", blocks="layers", example_inputs=x, example_targets=y
        )
        compiled.loss(x, y)
        total.append(sum(v for k, v in compiled.losses.items() if k != "task"))
    assert 0 < total[0] < total[1]


def test_all_steps_share_dropout_and_normalise_by_their_own_batch():
    """The exact variant is backpropagation with the same mask, through batch-norm too."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    eager = copy.deepcopy(model)
    torch.manual_seed(3)
    exact = eager_grads(eager, F.cross_entropy(eager(x), y))
    compiled = gr.compile(
        model, "predictive_coding{variant=exact}", blocks="layers", example_inputs=x, example_targets=y
    )
    torch.manual_seed(3)
    found = train_step(compiled, x, y)
    for name, gradient in exact.items():
        assert (found[name] - gradient).abs().max() < 1e-14, name
    for name, held in model.named_buffers():
        assert torch.equal(held, dict(eager.named_buffers())[name])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("variant=loose", "variant='loose' is unknown"),
        *[
            pytest.param(options, text, marks=SLOW)
            for options, text in [
                ("step_size=0", "step_size > 0"),
                ("steps=-1", "steps >= 0"),
                ("nudge=0.0", "no nudge"),
                ("variant=fixed,incremental=true", "variant='strict'"),
                ("incremental=true,rate=0.0", "moves no weight"),
            ]
        ],
    ],
)
def test_options_that_make_no_sense(options, text):
    model = mlp()
    x, y = batch(model)
    with pytest.raises(gr.RuleError, match=text):
        gr.compile(model, f"predictive_coding{{{options}}}", blocks="layers", example_inputs=x, example_targets=y)


def test_a_single_block_is_refused():
    with pytest.raises(gr.RuleError, match="nothing to settle"):
        gr.compile(
            nn.Linear(4, 3),
            "predictive_coding",
            example_inputs=torch.randn(5, 4),
            example_targets=torch.zeros(5).long(),
        )


@pytest.mark.parametrize(
    ("rule", "left", "enough"),
    [
        ("predictive_coding{steps=2}", "to 0,", "steps=3"),
        *[
            pytest.param(*case, marks=SLOW)
            for case in [
                ("predictive_coding{variant=fixed,steps=1}", "to 0, 2,", "steps=3"),
                ("predictive_coding{incremental=true,steps=2}", "to 0, 2,", "steps=4"),
                ("equilibrium_propagation{nudged_steps=2}", "to 0,", "nudged_steps=3"),
            ]
        ],
    ],
)
def test_steps_that_leave_blocks_untaught_warn(rule, left, enough):
    """One block per step: what the warning names has no gradient, with as many steps as it asks for all have one."""
    model = mlp()
    x, y = batch(model)
    with pytest.warns(UserWarning, match=f"does not bring it {left}.* from {enough} on"):
        found = train_step(gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y), x, y)
    named = left.removeprefix("to ").rstrip(",").split(", ")
    assert {name.split(".")[0] for name, g in found.items() if not g.any()} == {*named}
    rule = re.sub(r"(nudged_)?steps=\d+", enough, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = train_step(gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y), x, y)
    assert all(g.any() for g in found.values())


@SLOW
def test_weights_do_not_move_by_an_empty_batch():
    model = mlp()
    x, y = batch(model)
    compiled = gr.compile(model, "predictive_coding{incremental=true}", blocks="layers")
    with pytest.raises(gr.RuleError, match="the batch is empty"):
        compiled.loss(x[:0], y[:0])
