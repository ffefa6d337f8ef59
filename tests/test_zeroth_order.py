"""Zeroth order against loops written out, its expectation and variance, its memory, and steps in place."""

from __future__ import annotations

import copy
import math
import zlib

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import graphrewrite as gr
import processes
from graphrewrite import random
from graphrewrite.graph.loop import LoopCall, is_loop
from graphrewrite.graph.nodes import info
from graphrewrite.testing.memory import equal_blocks, gradient_bytes, measured_peak, peak_bytes
from graphrewrite.testing.rules import assert_locality_is_certified
from helpers import assert_close, assert_equal, eager_grads, train_step

SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:.*times the squared gradient.*:UserWarning")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def conv() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def batch(model: nn.Module):
    torch.manual_seed(1)
    shape = (5, 4) if isinstance(model[0], nn.Linear) else (5, 1, 6, 6)
    return torch.randn(shape).double(), torch.randint(0, 3, (5,))


def direction(name: str, like: torch.Tensor, number: int, distribution: str, counter=(0, 0, 0)) -> torch.Tensor:
    """z of one parameter: numbers of the stream that is told by the parameter's name."""
    stream = 0x80000000 | zlib.crc32(f"parameter {name}".encode())
    drawn = torch.tensor(counter)
    return random.direction(drawn, stream, like.shape, torch.tensor(number), distribution, like.dtype)


def estimate(model, x, y, *, eps, queries, difference, distribution) -> dict[str, torch.Tensor]:
    """1/K sum_k c_k z_k, one query after the other, on a functional copy of the model."""
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss_at(z, sign) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, {n: w + sign * eps * z[n] for n, w in weights.items()}, x), y)

    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    for k in range(queries):
        z = {n: direction(n, w, k, distribution) for n, w in weights.items()}
        if difference == "central":
            c = (loss_at(z, 1) - loss_at(z, -1)) / (2 * eps)
        elif difference == "forward":
            c = (loss_at(z, 1) - loss_at(z, 0)) / eps
        else:
            c = loss_at(z, 1) / eps
        total = {n: total[n] + c.detach() * z[n] / queries for n in total}
    return total


@pytest.mark.parametrize("make", [mlp, pytest.param(conv, marks=SLOW)])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("zeroth_order", {"queries": 1, "difference": "central", "distribution": "normal"}),
        pytest.param(
            "zeroth_order{queries=3,distribution=sign}",
            {"queries": 3, "difference": "central", "distribution": "sign"},
            marks=SLOW,
        ),
        ("zeroth_order{method=stein,queries=4}", {"queries": 4, "difference": "forward", "distribution": "normal"}),
        pytest.param(
            "zeroth_order{difference=single}",
            {"queries": 1, "difference": "single", "distribution": "normal"},
            marks=SLOW,
        ),
    ],
)
def test_directions_by_hand(make, rule, options):
    model = make()
    x, y = batch(model)
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
    found = train_step(compiled, x, y)
    assert_close(found, estimate(model, x, y, eps=1e-3, **options), rtol=1e-8)
    assert compiled.losses["task"] == F.cross_entropy(model(x), y)


@pytest.mark.parametrize(
    ("make", "difference"),
    [(mlp, "forward"), pytest.param(mlp, "central", marks=SLOW), pytest.param(conv, "forward", marks=SLOW)],
)
def test_coordinates_by_hand(make, difference):
    model, eps = make(), 1e-3
    x, y = batch(model)
    compiled = gr.compile(
        model, f"zeroth_order{{method=coordinate,difference={difference}}}", example_inputs=x, example_targets=y
    )
    found = train_step(compiled, x, y)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        base = F.cross_entropy(reference(x), y)
        for name, p in reference.named_parameters():
            flat, expected = p.view(-1), torch.zeros(p.numel()).double()
            for i in range(p.numel()):
                kept = flat[i].item()
                flat[i] = kept + eps
                above = F.cross_entropy(reference(x), y)
                flat[i] = kept - eps
                below = F.cross_entropy(reference(x), y)
                flat[i] = kept
                expected[i] = (above - base) / eps if difference == "forward" else (above - below) / (2 * eps)
            assert_close({name: found[name].flatten()}, {name: expected}, rtol=1e-8)


@SLOW
def test_central_coordinates_are_backpropagation_up_to_eps_squared():
    model = mlp()
    x, y = batch(model)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    errors = []
    for eps in (1e-2, 1e-3):
        rule = f"zeroth_order{{method=coordinate,difference=central,scale={eps}}}"
        found = train_step(gr.compile(model, rule, example_inputs=x, example_targets=y), x, y)
        errors.append(max((found[n] - exact[n]).abs().max().item() for n in exact))
    assert errors[1] < 1e-6
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)


def test_passes_share_dropout_and_normalise_by_their_own_batch():
    """With the same seed the coordinate-wise estimate is backpropagation's gradient, noise and all."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3), nn.Dropout(0.3)
    ).double()
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    eager = copy.deepcopy(model)
    torch.manual_seed(3)
    exact = eager_grads(eager, F.cross_entropy(eager(x), y))
    rule = "zeroth_order{method=coordinate,difference=central,scale=0.0001}"
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
    torch.manual_seed(3)
    found = train_step(compiled, x, y)
    for name, gradient in exact.items():
        assert (found[name] - gradient).abs().max() < 1e-6, name
    assert_equal(dict(model.named_buffers()), dict(eager.named_buffers()))


def test_sparsity_leaves_out_other_coordinates_in_every_step():
    model = mlp()
    x, y = batch(model)
    full = train_step(gr.compile(model, "zeroth_order{method=coordinate}", example_inputs=x, example_targets=y), x, y)
    compiled = gr.compile(model, "zeroth_order{method=coordinate,sparsity=0.75}", example_inputs=x, example_targets=y)
    first, second = train_step(compiled, x, y), train_step(compiled, x, y)
    for name, gradient in first.items():
        kept = gradient != 0
        assert kept.sum() == max(1, round(0.25 * gradient.numel()))
        assert_close({name: gradient[kept]}, {name: full[name][kept]})
    assert any((first[n] != 0).ne(second[n] != 0).any() for n in first)


def test_salient_coordinates_are_asked_for_again():
    """Half of the queries go where the running mean of |G_i| is largest; it moves where a query was spent."""
    model = nn.Linear(8, 4, bias=False).double()
    x, y = torch.randn(5, 8).double(), torch.randint(0, 4, (5,))
    rule = "zeroth_order{method=coordinate,sparsity=0.75,mask=salient}"
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
    held = torch.zeros(32).double()
    for step in range(3):
        found = train_step(compiled, x, y)["weight"].flatten()
        asked = found != 0
        assert asked.sum() == 8
        if step:
            assert asked[held.topk(4).indices].all()
        held = torch.where(asked, (held + found.abs()) / 2, held)
        (state,) = compiled.rule_state.values()
        assert_close({"saliency": state}, {"saliency": held})


def test_the_common_prefix_is_computed_once():
    """The loops of the last layer's coordinates hold no operator of the layers before it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    rule = "zeroth_order{method=coordinate}"
    graph = gr.compile(model, rule, blocks="layers", example_inputs=x, example_targets=y).graph("operator")
    bodies = [{info(n).block for n in LoopCall.of(n).body.nodes} - {"loss"} for n in graph.nodes if is_loop(n)]
    assert bodies == [{"0", "2", "4"}] * 2 + [{"2", "4"}] * 2 + [{"4"}] * 2


# --- expectation and variance --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "excess", "steps"),
    [("normal", 1, 400), pytest.param("normal", 1, 3000, marks=SLOW), pytest.param("sign", -1, 3000, marks=SLOW)],
)
def test_unbiased_with_the_predicted_variance(distribution, excess, steps):
    """On a quadratic, E G = the gradient and E |G - grad|^2 / |grad|^2 = d + 1 (signs: d - 1)."""
    model = nn.Linear(4, 2, bias=False).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    compiled = gr.compile(
        model, f"zeroth_order{{distribution={distribution}}}", example_inputs=x, example_targets=y, loss=F.mse_loss
    )
    exact = eager_grads(model, F.mse_loss(model(x), y))["weight"]
    drawn = torch.stack([train_step(compiled, x, y)["weight"] for _ in range(steps)])
    error = drawn.mean(0) - exact
    spread = drawn.std(0) / math.sqrt(len(drawn))
    assert (error.abs() < 4.5 * spread).all()
    ratio = (drawn - exact).flatten(1).square().sum(1) / exact.square().sum()
    width = 4.5 * ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - (exact.numel() + excess)) < width
    # the test can fail: twice the variance would not pass
    assert width < exact.numel()


@SLOW
def test_queries_average():
    model = nn.Linear(4, 2, bias=False).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    compiled = gr.compile(model, "zeroth_order{queries=300}", example_inputs=x, example_targets=y, loss=F.mse_loss)
    exact = eager_grads(model, F.mse_loss(model(x), y))["weight"]
    error = (train_step(compiled, x, y)["weight"] - exact).square().sum() / exact.square().sum()
    # (d + 1) / K = 0.03 in expectation; a mean over d + 1 = 9 squares strays by far less than five times that
    assert 0 < error < 5 * (exact.numel() + 1) / 300


def test_directions_are_standard_normal_and_signs():
    drawn, number = torch.tensor([7, 3, 0]), torch.tensor(0)
    normal = random.direction(drawn, 5, [40000], number, "normal")
    assert abs(normal.mean()) < 4.5 / 200
    assert abs(normal.square().mean() - 1) < 4.5 * math.sqrt(2) / 200
    assert abs((normal**4).mean() - 3) < 4.5 * math.sqrt(96) / 200
    # numbers of different streams, pieces of a stream, and the two halves of a pair have nothing to do with each other
    for other in (random.direction(drawn, 6, [40000], number, "normal"), normal.roll(1), normal.roll(1 << 14)):
        assert abs((normal * other).mean()) < 4.5 / 200
    sign = random.direction(drawn, 5, [40000], number, "sign")
    assert torch.equal(sign.abs(), torch.ones_like(sign))
    assert abs(sign.mean()) < 4.5 / 200
    other = random.direction(drawn, 5, [40000], number + 1, "normal")
    assert abs((normal * other).mean()) < 4.5 / 200


def test_the_generator_of_directions_is_split_mix():
    """The published sequence for seed 1234567, and the same recurrence in Python integers for one draw."""
    words = random._split_mix(torch.tensor(1234567), 0, 3)
    assert [w % 2**64 for w in words.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = dict(random.in_chunks(torch.tensor([3, 1, 0]), 9, 40000, 2, "normal"))
    assert list(found) == [0, 1 << 14, 2 << 14]
    whole = random.direction(torch.tensor([3, 1, 0]), 9, [200, 200], torch.tensor(2), "normal")
    assert torch.equal(torch.cat(list(found.values())), whole.flatten())


# --- reproducible --------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_step_and_rank():
    model = mlp()
    x, y = batch(model)

    ready = {}

    def gradients(rule="zeroth_order", *, seed=0, step=0, rank=0):
        if (rule, seed) not in ready:
            ready[rule, seed] = gr.compile(model, rule, example_inputs=x, example_targets=y, seed=seed)
        compiled = ready[rule, seed]
        compiled.set_extra_state({"step": step})
        compiled._rank = rank
        return train_step(compiled, x, y)

    base = gradients()
    assert_equal(base, gradients())
    for other in ({"seed": 1}, {"step": 1}, {"rank": 1}):
        found = gradients(**other)
        assert all(not torch.allclose(base[n], found[n]) for n in base), other


@SLOW
def test_shared_directions_are_those_of_every_rank():
    model = mlp()
    x, y = batch(model)
    compiled = gr.compile(model, "zeroth_order{shared=true}", example_inputs=x, example_targets=y)
    first = train_step(compiled, x, y)
    compiled.set_extra_state({"step": 0})
    compiled._rank = 1
    assert_equal(first, train_step(compiled, x, y))


@SLOW
def test_the_step_advances_and_losses_scale():
    model = mlp()
    x, y = batch(model)
    compiled = gr.compile(model, "zeroth_order", example_inputs=x, example_targets=y)
    first, second = train_step(compiled, x, y), train_step(compiled, x, y)
    assert not torch.allclose(first["0.weight"], second["0.weight"])
    compiled.set_extra_state({"step": 0})
    compiled.zero_grad()
    (compiled.loss(x, y) * 3).backward()
    assert_close({n: p.grad / 3 for n, p in model.named_parameters()}, first)


def _of_rank(rank: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = mlp()
    torch.manual_seed(10 + rank)
    return model, torch.randn(5, 4).double(), torch.randint(0, 3, (5,))


def _two_ranks(rank: int, rules: list[str]):
    """For every rule the weights after two steps in place, and the gradients that DDP makes of the ranks'."""
    found = []
    for rule in rules:
        model, x, y = _of_rank(rank)
        compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
        losses = [compiled.zo_step(x, y, lr=0.1, weight_decay=0.01) for _ in range(2)]
        model, x, y = _of_rank(rank)
        wrapped = nn.parallel.DistributedDataParallel(gr.compile(model, rule).loss_module())
        wrapped(x, y).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        found.append((dict(compiled.module.state_dict()), losses, grads))
    return found


@SLOW
def test_ranks_draw_their_own_directions_and_stay_equal(tmp_path):
    """On two processes: equal weights bit by bit; the mean over ranks of what one process finds as each of them."""
    rules = ["zeroth_order{queries=2}", "zeroth_order{method=stein,queries=2}", "zeroth_order{shared=true}"]
    ranks = processes.run(_two_ranks, (rules,), tmp_path)
    for rule, first, second in zip(rules, *ranks, strict=True):
        assert_equal(first[0], second[0])
        assert_equal(first[2], second[2])
        assert torch.equal(torch.stack(first[1]), torch.stack(second[1]))
        # the same, one process playing both ranks
        twins = [(gr.compile(model, rule), x, y) for model, x, y in (_of_rank(0), _of_rank(1))]
        by_rank = []
        for step in range(2):
            grads = []
            for rank, (compiled, x, y) in enumerate(twins):
                compiled._rank = rank
                grads.append(train_step(compiled, x, y))
            if step == 0:
                by_rank = grads
                assert_close(first[2], {n: (grads[0][n] + grads[1][n]) / 2 for n in grads[0]}, rtol=1e-8)
            with torch.no_grad():
                for compiled, _, _ in twins:
                    for name, p in compiled.module.named_parameters():
                        decay = 0.01 * p if p.dim() > 1 else 0
                        p -= 0.1 * ((grads[0][name] + grads[1][name]) / 2 + decay)
        assert_close(first[0], dict(twins[0][0].module.state_dict()), rtol=1e-8)
        drawn = [g["0.weight"] / g["2.weight"].flatten()[0] for g in by_rank]
        assert torch.allclose(*drawn) == ("shared" in rule), rule


# --- memory --------------------------------------------------------------------------------------------------------


def test_no_activation_is_held():
    """Saved for the backward: K numbers. Peak beside the gradients: not a function of depth."""
    peaks = []
    x, y = torch.randn(256, 16), torch.randint(0, 10, (256,))
    for depth in (2, 4):
        model = equal_blocks(depth, 16)
        compiled = gr.compile(model, "zeroth_order{queries=2}", example_inputs=x, example_targets=y)
        # two differences and (seed, step, rank)
        assert compiled.program().partition.saved_bytes == 8 + 24
        peaks.append(measured_peak(compiled, x, y) - gradient_bytes(model))
    assert peaks[1] <= peaks[0] * 1.05
    # depth 4 holds four activations and more under backpropagation
    assert peaks[1] < 4 * x.numel() * 4


@pytest.mark.parametrize(
    ("width", "samples", "rule"),
    [
        pytest.param(32, 2048, "zeroth_order", marks=SLOW),
        pytest.param(32, 2048, "zeroth_order{method=stein,queries=3}", marks=SLOW),
        # the room that 256 numbers at a time need, and weights that are a thousand times a sample
        (32, 128, "zeroth_order{distribution=sign}"),
        (512, 64, "zeroth_order"),
    ],
)
def test_zo_step_takes_the_memory_of_inference(width, samples, rule):
    model = equal_blocks(3, width)
    x, y = torch.randn(samples, width), torch.randint(0, 10, (samples,))
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
    known = [*model.parameters(), x, y]

    def infer():
        with torch.no_grad():
            F.cross_entropy(model(x), y)

    assert peak_bytes(lambda: compiled.zo_step(x, y, 1e-3), known) <= 1.05 * peak_bytes(infer, known)
    assert all(p.grad is None for p in model.parameters())


@SLOW
def test_zo_step_of_a_single_sample_takes_a_share_of_the_weights():
    model = equal_blocks(3, 512)
    x, y = torch.randn(1, 512), torch.randint(0, 10, (1,))
    compiled = gr.compile(model, "zeroth_order", example_inputs=x, example_targets=y)
    extra = peak_bytes(lambda: compiled.zo_step(x, y, 1e-3), [*model.parameters(), x, y])
    assert extra <= 0.05 * gradient_bytes(model)


@SLOW
def test_zo_step_moves_weights_of_any_layout_alike():
    """Nothing of the size of a weight is made, whatever the order of its elements in memory."""
    ends = []
    x, y = torch.randn(2, 16, 4, 4), torch.randint(0, 3, (2,))
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(256, 3)).to(memory_format=layout)
        compiled = gr.compile(model, "zeroth_order", example_inputs=x, example_targets=y)
        known = [*model.parameters(), x, y]
        assert peak_bytes(lambda c=compiled: c.zo_step(x, y, 0.1), known) < 0.25 * model[0].weight.nbytes
        ends.append(dict(model.state_dict()))
    assert_close(*ends, rtol=1e-5)


# --- steps in place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        "zeroth_order",
        pytest.param("zeroth_order{queries=3,distribution=sign}", marks=SLOW),
        pytest.param("zeroth_order{method=stein,queries=2}", marks=SLOW),
    ],
)
def test_zo_step_is_sgd_on_the_gradients(rule):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)).double()
    model[4].bias.requires_grad_(False)
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    twin = copy.deepcopy(model)
    with_gradients = gr.compile(twin, rule, example_inputs=x, example_targets=y)
    in_place = gr.compile(model, rule, example_inputs=x, example_targets=y)
    for step in range(3):
        torch.manual_seed(step)
        grads = train_step(with_gradients, x, y)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name in grads:
                    p -= 0.1 * (grads[name] + (0.01 * p if p.dim() > 1 else 0))
        after = torch.get_rng_state()
        torch.manual_seed(step)
        in_place.zo_step(x, y, lr=0.1, weight_decay=0.01)
        assert torch.equal(after, torch.get_rng_state())
        assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-9)
    assert model[1].num_batches_tracked == 3


def test_zo_step_moves_downhill():
    """The sign of the update: a step along -G lowers a quadratic loss on average."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(32, 4).double(), torch.randn(32, 2).double()
    compiled = gr.compile(model, "zeroth_order", example_inputs=x, example_targets=y, loss=F.mse_loss)
    before = F.mse_loss(model(x), y).item()
    for _ in range(100):
        compiled.zo_step(x, y, lr=0.02)
    least = torch.linalg.lstsq(torch.cat([x, torch.ones(32, 1).double()], 1), y).solution
    best = F.mse_loss(torch.cat([x, torch.ones(32, 1).double()], 1) @ least, y).item()
    assert F.mse_loss(model(x), y).item() - best < 0.3 * (before - best)


def test_zo_step_refuses_rules_that_have_gradients_to_hold():
    model = mlp()
    x, y = batch(model)
    for rule in ("bp", {"0": "zeroth_order"}):  # a map's other modules use bp
        compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
        with pytest.raises(gr.RuleError, match="zo_step updates every block"):
            compiled.zo_step(x, y, 0.1)


@SLOW
@pytest.mark.parametrize("options", ["", "{difference=forward}"])
def test_a_step_that_raises_leaves_the_weights_where_they_were(options):
    model = mlp()
    x, y = batch(model)
    calls = []

    def loss(out, y):
        calls.append(None)
        if len(calls) > 2:
            raise ValueError("out of samples")
        return F.cross_entropy(out, y)

    compiled = gr.compile(model, f"zeroth_order{options}", loss=loss, example_inputs=x, example_targets=y)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    calls[:] = [None]
    with pytest.raises(ValueError, match="out of samples"):
        compiled.zo_step(x, y, 0.1)
    assert_close(dict(model.named_parameters()), before, rtol=1e-14)


@SLOW
def test_zo_step_warns_about_half_precision():
    model = nn.Linear(4, 3).to(torch.bfloat16)
    x, y = torch.randn(5, 4, dtype=torch.bfloat16), torch.randint(0, 3, (5,))
    compiled = gr.compile(model, "zeroth_order{scale=0.1}", example_inputs=x, example_targets=y)
    with pytest.warns(UserWarning, match="do not come back exactly"):
        compiled.zo_step(x, y, 0.1)


# --- certificate, refusals -----------------------------------------------------------------------------------------


def test_certificate():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    compiled = gr.compile(model, "zeroth_order", blocks="layers", example_inputs=x, example_targets=y)
    found = compiled.report().certificates
    assert not found.weight_transport
    assert not found.backward_locked
    assert [bool(b.update_locked) for b in found.blocks] == [True, True, False]
    assert [b.locality_radius for b in found.blocks] == [2, 1, 0]
    assert all(b.global_error for b in found.blocks)
    assert found.forward_passes == 3


@SLOW
def test_locality_is_as_certified():
    model = mlp()
    assert_locality_is_certified(model, "zeroth_order", *batch(model), blocks="layers")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("scale=0", "scale=0 tells nothing"),
        ("queries=0", "queries=0"),
        *[
            pytest.param(options, text, marks=SLOW)
            for options, text in [
                ("method=adam", "method='adam' is unknown"),
                ("difference=left", "difference='left' is unknown"),
                ("distribution=cauchy", "distribution='cauchy' is unknown"),
                ("sparsity=0.5", "all weights at once"),
                ("method=coordinate,sparsity=1.0", "leaves no coordinate"),
                ("method=coordinate,sparsity=0.5,mask=grasp", "mask='grasp' is unknown"),
                ("method=coordinate,mask=salient", "nothing to choose"),
                ("method=coordinate,queries=3", "one query per coordinate"),
                ("method=coordinate,difference=single", "the loss they start from"),
            ]
        ],
    ],
)
def test_options_that_make_no_sense(options, text):
    model = mlp()
    x, y = batch(model)
    with pytest.raises(gr.RuleError, match=text):
        gr.compile(model, f"zeroth_order{{{options}}}", example_inputs=x, example_targets=y)


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=SLOW)])
def test_differences_that_rounding_swallows_warn(autocast):
    model = nn.Linear(4, 3).to(torch.float32 if autocast else torch.bfloat16)
    x, y = torch.randn(5, 4, dtype=model.weight.dtype), torch.randint(0, 3, (5,))
    said = r"scale=0.001 .* bfloat16 values that are rounded to 0.0078 of themselves"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.warns(UserWarning, match=said):
        gr.compile(model, "zeroth_order", example_inputs=x, example_targets=y)


def test_few_queries_for_many_weights_warn_with_the_variance():
    model = nn.Linear(100, 20)
    x, y = torch.randn(4, 100), torch.randint(0, 20, (4,))
    with pytest.warns(UserWarning, match=r"1 random direction for 2020 weights.* 2.02e\+03 times"):
        gr.compile(model, "zeroth_order", example_inputs=x, example_targets=y)


def test_noise_that_reads_activations_is_refused_by_name():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(torch.bernoulli(torch.sigmoid(self.a(x))))

    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    with pytest.raises(gr.RuleError, match=r"bernoulli.default would draw other numbers"):
        gr.compile(Noisy(), "zeroth_order", example_inputs=x, example_targets=y)


@pytest.mark.parametrize(
    "rule",
    [
        "zeroth_order",
        *[pytest.param(r, marks=SLOW) for r in ("forward_gradient{perturb=weights}", "equilibrium_propagation")],
    ],
)
def test_an_empty_batch_is_refused_before_it_spoils_every_weight(rule):
    model = mlp()
    x, y = batch(model)
    compiled = gr.compile(model, rule, blocks="layers")
    with pytest.raises(gr.RuleError, match=r"the batch is empty.*\n.*drop_last"):
        compiled.loss(x[:0], y[:0])


def test_training_through_the_forward_is_refused():
    model = mlp()
    x, y = batch(model)
    with pytest.raises(gr.RuleError, match=r"compiled\.loss"):
        F.cross_entropy(gr.compile(model, "zeroth_order")(x), y).backward()
