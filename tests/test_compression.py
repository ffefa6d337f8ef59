"""Codecs on models: bytes against measured storages, exact codecs against eager mode, rules, plans and bad input."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from graphrewrite.passes.compression._plan_solver import Candidate, Choice, Problem, solve
from graphrewrite.passes.compression.int8 import Int8
from graphrewrite.passes.compression.mask import SignMask
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.analysis.cost import count
from graphrewrite.analysis.demands import Demand, saved_values
from graphrewrite.graph.nodes import info
from graphrewrite.graph.ops import is_random
from graphrewrite.testing import zoo
from graphrewrite.testing.memory import peak_bytes, predicted_peak, saved_bytes

EXACT = ("mask", "recompute", "recompute{plan=blocks}", "recompute{plan=all}")
TOLERANCE = {"int8": 0.03, "int4": 0.6, "bf16": 0.02, "fp16": 0.003, "fp8": 0.15, "none": 0.0}


def leaves(*trees):
    return [t for t in torch.utils._pytree.tree_leaves(trees) if isinstance(t, torch.Tensor)]


def measured(compiled, x, y):
    """Unique storages that the autograd function holds; inputs, parameters, buffers and constants are not counted."""
    constants = compiled.program("loss").partition.graph.constants.values()
    known = [*compiled.parameters(), *compiled.buffers(), *leaves(x, y), *constants]
    return saved_bytes(lambda: compiled.loss(x, y), known)


def step(compiled, x, y, seed=3):
    compiled.zero_grad()
    torch.manual_seed(seed)
    compiled.loss(x, y).backward()
    return {n: p.grad.clone() for n, p in compiled.module.named_parameters() if p.grad is not None}


def error(found, exact):
    a, b = (torch.cat([g.flatten().double() for g in one.values()]) for one in (found, exact))
    return float((a - b).norm() / b.norm())


def assert_equal(found, exact):
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert torch.equal(found[name], gradient), name


class Net(nn.Module):
    """ReLU between linear layers, dropout, pooling: something for every kind of mask."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 32), nn.ReLU6())
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        h = self.pool(F.leaky_relu(self.conv(x), 0.1))
        return self.head(self.body(h.flatten(1)))


def batch(n, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator)


@pytest.fixture(scope="module")
def exact():
    """Plain backpropagation on the net, and what it saves."""
    torch.manual_seed(0)
    model = Net()
    x, y = batch(6)
    compiled = gr.compile(model, example_inputs=(x,), example_targets=(y,))
    return model, compiled, step(compiled, x, y), measured(compiled, x, y)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec"), [("mlp", None), ("mlp", "int8")])
def test_predicted_bytes_are_the_measured_ones(name, codec):
    case = zoo.make(name)
    x, y = case.batch(case.sizes[0])
    compiled = gr.compile(case.model, loss=case.loss, compress=codec).materialize(x, y)
    assert compiled.report().saved_bytes == measured(compiled, x, y) > 0


EVERY = (
    *("int8", "int4", "int2", "mask", "none", "bf16", "fp16", "fp8", "topk", "hadamard", "lowrank", "velora"),
    *("recompute", "recompute{plan=blocks}", "int4{rounding=stochastic}"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_predicted_bytes_are_the_measured_ones_everywhere(name):
    for codec in (None, *EVERY):
        case = zoo.make(name)
        torch.manual_seed(1)
        x, y = case.batch(case.sizes[0])
        compiled = gr.compile(case.model, loss=case.loss, compress=codec, verify="off").materialize(x, y)
        assert compiled.report().saved_bytes == measured(compiled, x, y), codec


def test_a_codec_stores_its_own_bytes(exact):
    model, _, gradients, plain = exact
    x, y = batch(6)
    compiled = gr.compile(model, compress="int8", example_inputs=(x,), example_targets=(y,))
    report = compiled.report()
    assert report.saved_bytes == measured(compiled, x, y) < 0.75 * plain
    treated = [one for one in report.plan if one.codec == "int8"]
    assert len(treated) >= 4
    assert all(one.after < one.before for one in treated)
    assert {row.codec for row in report.saved} == {"", "int8", "mask"}
    assert sum(one.after for one in report.plan) == report.saved_bytes
    assert 0 < error(step(compiled, x, y), gradients) < TOLERANCE["int8"]


@pytest.mark.slow
def test_codecs_with_smaller_codes_save_less_and_err_more(exact):
    model = exact[0]
    x, y = batch(64)
    truth = step(exact[1], x, y)
    found = []
    for codec in ("int8", "int4", "int2"):
        compiled = gr.compile(model, compress=["mask", codec], example_inputs=(x,), example_targets=(y,), verify="off")
        found.append((measured(compiled, x, y), error(step(compiled, x, y), truth)))
    assert found[0][0] > found[1][0] > found[2][0]
    assert found[0][1] < found[1][1] < found[2][1]


# --- exact codecs ----------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize("codec", ["mask", *[pytest.param(c, marks=SLOW) for c in EXACT[1:]]])
def test_exact_codecs_are_bitwise_backpropagation(exact, codec):
    model, _, gradients, plain = exact
    x, y = batch(6)
    compiled = gr.compile(model, compress=codec, example_inputs=(x,), example_targets=(y,))
    assert_equal(step(compiled, x, y), gradients)
    assert measured(compiled, x, y) == compiled.report().saved_bytes < plain
    for size in (9,):
        x, y = batch(size)
        assert_equal(step(compiled, x, y), step(exact[1], x, y))


@pytest.mark.slow
@pytest.mark.parametrize("codec", EXACT)
@pytest.mark.parametrize("name", ["cnn", "gpt", "resnet", "bert", "unet", "moe"])
def test_exact_codecs_are_bitwise_backpropagation_on_the_zoo(name, codec):
    case = zoo.make(name)
    x, y = case.batch(4)
    plain = step(gr.compile(case.model, loss=case.loss), x, y)
    assert_equal(step(gr.compile(case.model, loss=case.loss, compress=codec), x, y), plain)


@pytest.mark.slow
def test_masks_are_bits(exact):
    """ReLU, dropout and pooling: 1, 1 and 2 bits per element instead of 32, 32 and 64."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5))
    x = torch.randn(16, 1, 16, 16)
    compiled = gr.compile(model, compress="mask")
    compiled(x).sum().backward()
    gradient = model[0].weight.grad.clone()
    rows = {one.operator: (one.before, one.after) for one in compiled.report().plan if one.codec == "mask"}
    elements = 16 * 4 * 16 * 16
    assert rows["relu"] == (4 * elements, elements // 8)
    assert rows["max_pool2d_with_indices"] == (8 * elements // 4, elements // 4 * 2 // 8)
    assert rows["div"] == (4 * elements // 4, elements // 4 // 8)
    assert gradient.abs().sum() > 0


aten = torch.ops.aten
COMPARED = {
    "relu": (("above", (0.0,)), lambda g, x: aten.threshold_backward(g, x, 0)),
    "threshold": (("above", (0.3,)), lambda g, x: aten.threshold_backward(g, x, 0.3)),
    "hardtanh": (("between", (-0.5, 0.7)), lambda g, x: aten.hardtanh_backward(g, x, -0.5, 0.7)),
    "relu6": (("between", (0.0, 6.0)), lambda g, x: aten.hardtanh_backward(g, x, 0.0, 6.0)),
    "hardsigmoid": (("hardsigmoid", (-3.0, 3.0)), aten.hardsigmoid_backward),
    "leaky_relu": (("positive", ()), lambda g, x: aten.leaky_relu_backward(g, x, 0.2, False)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", COMPARED)
def test_masks_compare_as_the_operator_does(name, dtype):
    """At the limits, at infinities and at NaN the derivative is bitwise the same."""
    comparison, backward = COMPARED[name]
    limits = [-4.0, -3.0, -0.5, -0.0, 0.0, 0.3, 0.7, 1.0, 3.0, 6.0, 7.0, float("nan"), float("inf"), -float("inf")]
    x = torch.cat([torch.tensor(limits), torch.linspace(-8, 8, 83)]).to(dtype)
    cotangent = torch.randn(x.shape).to(dtype)
    codec = SignMask(comparison=comparison)
    held = codec.encode(x)
    assert held[0].numel() == (x.numel() + 7) // 8
    assert torch.equal(backward(cotangent, codec.decode(held, x)), backward(cotangent, x))


# --- which values ----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A value that is saved for several readers, one that is an output as well, and views of one storage."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        h = torch.tanh(self.a(x))  # read by tanh's own backward, by b and by c
        q, k, v = self.qkv(h).chunk(3, -1)
        out = torch.sigmoid(self.b(h) * self.c(h) + q * k * v)
        return out, h.sum()


def shared_step(compiled, x):
    compiled.zero_grad()
    out, total = compiled(x)
    (out.square().mean() + total / 100).backward()
    return {n: p.grad.clone() for n, p in compiled.module.named_parameters()}


def test_a_value_with_many_readers_is_encoded_once():
    model, x = Shared(), torch.randn(16, 32)
    plain = gr.compile(model, dynamic=None)
    exact = shared_step(plain, x)
    compiled = gr.compile(model, compress="int8", dynamic=None)
    assert 0 < error(shared_step(compiled, x), exact) < TOLERANCE["int8"]
    aten = compiled.graph("aten")
    encoded = [info(n).encodes for n in aten.nodes if n.op == "call_function" and info(n).codec]
    sources = [s for s in aten.nodes if s in encoded]
    assert len([s for s in sources if s.target is torch.ops.aten.tanh.default]) == 1
    plan = {one.operator: one for one in compiled.report().plan}
    # three views of the big projection are read, its storage is encoded once
    assert plan["addmm"].codec == "int8"
    rows = [row for row in compiled.report().saved if row.codec]
    assert sum(row.nbytes for row in rows if row.name == plan["tanh"].name) == 16 * 32 + 16 * 32 // 128 * 4


def test_an_output_is_never_encoded():
    model, x = Shared(), torch.randn(16, 32)
    compiled = gr.compile(model, compress="int8")
    shared_step(compiled, x)
    sigmoid = next(one for one in compiled.report().plan if one.operator == "sigmoid")
    assert sigmoid.codec == "keep"
    assert "the caller holds it" in sigmoid.why


@pytest.mark.slow
def test_permuted_values_and_views_of_them():
    """Channels-last activations: elements are encoded as they lie in memory and come back that way."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    y = torch.randint(0, 5, (4,))
    exact = step(gr.compile(model), x, y)
    compiled = gr.compile(model, compress="int8", verify="numeric")
    assert 0 < error(step(compiled, x, y), exact) < TOLERANCE["int8"]
    assert compiled.report().saved_bytes == measured(compiled, x, y)


@pytest.mark.slow
def test_what_must_be_exact_is_kept():
    case = zoo.make("gpt")
    x, y = case.batch(4)
    compiled = gr.compile(case.model, compress="int4", verify="off").materialize(x, y)
    reasons = " ".join(one.why for one in compiled.report().plan if one.codec == "keep")
    assert "logsumexp" in reasons
    assert "native_layer_norm_backward (mean)" in reasons
    assert "the loss" in reasons
    assert "does not store int64" in reasons
    assert compiled.report().saved_bytes == measured(compiled, x, y)


class Power(nn.Module):
    def __init__(self, exponent):
        super().__init__()
        self.linear, self.exponent = nn.Linear(16, 64), exponent

    def forward(self, x):
        return self.linear(x).exp().add(1).pow(self.exponent)


@pytest.mark.parametrize(("exponent", "kept"), [(2, False), (3.5, False), (-0.5, True)])
def test_small_powers_may_be_approximate(exponent, kept):
    """The derivative of x^2 is x: an error stays what it is; that of a negative power grows without bound."""
    compiled = gr.compile(Power(exponent), compress="int8", dynamic=None)
    compiled(torch.randn(32, 16)).sum().backward()
    reasons = [one.why for one in compiled.report().plan if one.codec == "keep"]
    assert any("pow (base)" in why for why in reasons) is kept


def test_signs_are_never_flipped():
    """ReLU's derivative reads its own bits, not the rounded value: with a linear net below, the mask decides alone."""
    model = nn.Sequential(nn.Linear(8, 256, bias=False), nn.ReLU(), nn.Linear(256, 4))
    x, y = torch.randn(32, 8), torch.randint(0, 4, (32,))
    exact = step(gr.compile(model), x, y)
    compiled = gr.compile(model, compress="int2")
    found = step(compiled, x, y)
    assert torch.equal(found["0.weight"], exact["0.weight"])
    assert not torch.equal(found["2.weight"], exact["2.weight"])
    assert sorted(row.codec for row in compiled.report().saved if row.codec)[-1] == "mask"


# --- choosing --------------------------------------------------------------------------------------------------------


def treatments(model, compress, x, y):
    compiled = gr.compile(model, compress=compress, verify="off").materialize(x, y)
    return list(compiled.report().plan)


@pytest.mark.slow
def test_selection_by_glob_operator_and_size(exact):
    model = exact[0]
    x, y = batch(6)
    by_module = treatments(model, {"body": "int8", "conv": ["mask", "int4"]}, x, y)
    for one in by_module:
        if one.codec == "int8":
            assert one.module.startswith("body")
        if one.codec == "int4":
            assert one.module == "conv"
        if not one.module.startswith(("body", "conv")):
            assert one.codec == "keep"
    assert {one.codec for one in by_module} >= {"int8", "keep"}
    by_operator = treatments(model, 'int8{operators=["gelu_backward"]}', x, y)
    taken = [one for one in by_operator if one.codec.startswith("int8")]
    assert len(taken) == 1
    assert taken[0].module == "body.0"
    big = treatments(model, "int8{min_bytes=2000}", x, y)
    assert all(one.before >= 2000 for one in big if one.codec.startswith("int8"))
    assert any("min_bytes" in one.why for one in big)
    skipped = treatments(model, ['none{only=["body"]}', "int8"], x, y)
    assert not any(one.module.startswith("body") and one.codec == "int8" for one in skipped)


@pytest.mark.slow
def test_first_codec_that_accepts_wins(exact):
    x, y = batch(6)
    found = {one.operator: one.codec for one in treatments(exact[0], ["mask", "topk", "int8"], x, y)}
    assert found["max_pool2d_with_indices"] in ("mask", "topk")
    assert "topk" in found.values()
    assert "int8" not in found.values()


@dataclass
class Halves:
    """A codec without any declaration."""

    def encode(self, tensor):
        return tensor.to(torch.float16)

    def decode(self, residuals, like):
        return residuals[0].to(like.dtype)


@pytest.mark.slow
def test_a_codec_needs_two_methods_only(exact):
    x, y = batch(6)
    compiled = gr.compile(exact[0], compress=Halves())
    assert 0 < error(step(compiled, x, y), exact[2]) < TOLERANCE["fp16"]
    assert any(row.codec == "Halves" for row in compiled.report().saved)


@pytest.mark.slow
def test_one_codec_may_be_registered_under_a_name(exact):
    gr.register("codec", "small_groups", lambda: Int8(group=16))
    x, y = batch(6)
    assert any(one.codec == "int8{group=16}" for one in treatments(exact[0], "small_groups", x, y))


# --- stochastic codes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stochastic_codes_of_linear_operands_are_unbiased():
    """The weight gradient is linear in the saved input: its mean over steps is the exact one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 48), nn.Linear(48, 3))
    x, y = torch.randn(16, 6), torch.randn(16, 3)
    exact = step(gr.compile(model, loss=F.mse_loss), x, y)["1.weight"].double()
    compiled = gr.compile(model, loss=F.mse_loss, compress="int2{rounding=stochastic}", seed=5)
    found = torch.stack([step(compiled, x, y)["1.weight"].double() for _ in range(256)])
    assert not torch.equal(found[0], found[1])  # the generator moves on with the step
    z = (found.mean(0) - exact) / (found.std(0) / 16)
    assert (z.abs() < 3).double().mean() >= 0.98
    again = gr.compile(model, loss=F.mse_loss, compress="int2{rounding=stochastic}", seed=5)
    assert torch.equal(step(again, x, y)["1.weight"].double(), found[0])


# --- rules, autocast, dynamic sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [pytest.param("dfa", marks=SLOW), "ff", pytest.param("mono_forward", marks=SLOW)])
def test_other_rules(rule):
    case = zoo.make("mlp")
    x, y = case.batch(64)
    plain = gr.compile(case.model, rule, seed=1)
    exact = step(plain, x, y)
    compiled = gr.compile(case.model, rule, compress=["mask", "int8"], seed=1)
    found = step(compiled, x, y)
    # finished gradients are handed on outside of what autograd is asked to save
    rows = [row for row in compiled.report().saved if row.kind != "gradient"]
    assert measured(compiled, x, y) == sum(row.nbytes for row in rows)
    if rule == "dfa":
        assert compiled.report().saved_bytes < 0.5 * plain.report().saved_bytes
        assert 0 < error(found, exact) < TOLERANCE["int8"]
    else:
        # the backward of hidden blocks runs in the forward: nothing but finished gradients is saved, never encoded;
        # the last block learns from the task loss
        hidden = [name for name in exact if not name.startswith("4.")]
        assert len(hidden) == 4
        assert_equal({n: found[n] for n in hidden}, {n: exact[n] for n in hidden})
        assert error(found, exact) < TOLERANCE["int8"]


def test_autocast_and_grad_scaler():
    case = zoo.make("mlp")
    x, y = case.batch(32)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    found = []
    for codec in (None, ["mask", "int8"]):
        compiled = gr.compile(case.model, compress=codec)
        compiled.zero_grad()
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled.loss(x, y)
        scaler.scale(loss).backward()
        found.append({n: p.grad.clone() / 256 for n, p in case.model.named_parameters()})
        assert compiled.report().saved_bytes == measured_under_autocast(compiled, x, y)
    assert 0 < error(found[1], found[0]) < TOLERANCE["int8"]


def measured_under_autocast(compiled, x, y):
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        return measured(compiled, x, y)


@pytest.mark.slow
def test_overflow_reaches_the_scaler(exact):
    """A value that is not finite decodes to one that is not, so that the step is skipped."""
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4))
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
    x[3, 3] = float("inf")
    gradients = step(gr.compile(model, compress="int4"), x, y)
    assert not gradients["2.weight"].isfinite().all()


@pytest.mark.slow
def test_any_batch_size_and_none(exact):
    model = exact[0]
    compiled = gr.compile(model, compress=["mask", "int8"])
    for size in (6, 9, 1, 33, 6):
        x, y = batch(size)
        assert error(step(compiled, x, y), step(exact[1], x, y)) < TOLERANCE["int8"]
    x, y = torch.randn(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)
    summed = gr.compile(model, compress=["mask", "int8"], loss=lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    assert all(g.abs().sum() == 0 for g in step(summed, x, y).values())


# --- the planner -----------------------------------------------------------------------------------------------------


def test_plan_holds_its_budget_and_says_why(exact):
    model, _, gradients, plain = exact
    x, y = batch(6)
    errors = []
    for budget in (1.0, 0.12):
        compiled = gr.compile(model, memory_budget=budget, example_inputs=(x,), example_targets=(y,))
        report = compiled.report()
        assert report.saved_bytes == measured(compiled, x, y) <= budget * plain
        assert sum(one.after for one in report.plan) == report.saved_bytes
        errors.append(error(step(compiled, x, y), gradients))
        assert all(one.why for one in report.plan)
        assert report.predicted_peak > 0
        if budget < 1:
            assert any("instead of keep" in one.why for one in report.plan)
            assert "plan:" in str(report)
    assert errors[0] == 0


def test_plan_without_recomputation_uses_codecs_and_predicts_the_error(exact):
    model, _, gradients, plain = exact
    x, y = batch(6)
    compiled = gr.compile(
        model, compress=["mask", "int8", "int4"], memory_budget=0.2, example_inputs=(x,), example_targets=(y,)
    )
    report = compiled.report()
    assert report.saved_bytes <= 0.2 * plain
    assert {"int8", "int4"} & {one.codec for one in report.plan}
    # independent errors add in squares
    predicted = sum((one.error or 0.0) ** 2 for one in report.plan) ** 0.5
    found = error(step(compiled, x, y), gradients)
    assert 0 < found < 2.5 * predicted
    assert predicted < 4 * found


def test_errors_are_followed_through_recomputations():
    """An error of one value reaches all that is recomputed from it, over others as well: alone it may be harmless."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer(), Layer()), torch.randn(64, 32)
    cotangent = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))

    def weighted(out, weights):
        return (out * weights).sum()

    def gradient(**options):
        model.zero_grad()
        compiled = gr.compile(model, loss=weighted, dynamic=None, **options)
        compiled.loss(x, cotangent).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}, compiled.report()

    exact = gradient()[0]
    found, report = gradient(memory_budget=0.08)
    taken = {line.codec.partition("{")[0] for line in report.plan}
    assert "recompute" in taken
    assert taken & {"bf16", "int8", "int4", "int2"}, taken
    assert 0 < error(found, exact) < 0.01

    # so little that statistics are recomputed as well, from what is stored with a codec
    found, report = gradient(memory_budget=0.03)
    assert {line.codec for line in report.plan if line.before == 4 * len(x)} == {"recompute"}
    assert {line.codec.partition("{")[0] for line in report.plan if line.operator == "add"} == {"int8"}
    assert 0 < error(found, exact) < 0.01


def test_masks_of_recomputed_values_are_not_exact():
    """A ReLU that is recomputed from a code turns on and off elsewhere: half a percent of change, 5 % of error."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU())]
    model, x, cotangent = nn.Sequential(*layers, nn.Linear(64, 64)), torch.randn(256, 64), torch.randn(256, 64)

    def gradient(**options):
        model.zero_grad()
        compiled = gr.compile(model, dynamic=None, **options)
        compiled(x).backward(cotangent)
        return {n: p.grad.clone() for n, p in model.named_parameters()}, compiled.report()

    exact, report = gradient()
    for share in (0.5, 0.3, 0.1):
        found, planned = gradient(memory_budget=int(share * report.saved_bytes))
        assert error(found, exact) < 0.01, [(line.operator, line.codec) for line in planned.plan]
    # nothing but codes, each with its mask, would do for the first
    assert error(gradient(compress="int8")[0], exact) < 0.01


def test_without_a_view_to_the_peak_fewer_operations_run_twice():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(4)])
    x, cotangent = torch.randn(256, 32), torch.randn(256, 32)
    found = []
    for passes in ((), ("plan_memory{budget=0.05}",), ("plan_memory{budget=0.05,peak=false}",)):
        model.zero_grad()
        compiled = gr.compile(model, dynamic=None, passes=passes)
        compiled(x).backward(cotangent)
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        found.append((grads, count(compiled.program("forward").partition.graph).total))
    (exact, once), *planned = found
    assert all(error(grads, exact) < 0.01 for grads, _ in planned)
    assert once < planned[1][1] < planned[0][1]


def test_attention_without_dropout_draws_nothing():
    for rate, random in ((0.0, False), (0.5, True)):
        graph = torch.fx.Graph()
        inputs = [graph.placeholder(name) for name in "qkv"]
        target = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        assert is_random(graph.call_function(target, (*inputs, rate))) is random
    assert not is_random(graph.call_function(target, tuple(inputs)))


@pytest.mark.slow
def test_budget_in_bytes_and_for_another_rule(exact):
    case = zoo.make("mlp")
    x, y = case.batch(64)
    plain = gr.compile(case.model).materialize(x, y).report().saved_bytes
    small = gr.compile(case.model, memory_budget=plain // 2).materialize(x, y)
    assert small.report().saved_bytes <= plain // 2
    dfa = gr.compile(case.model, "dfa", memory_budget=0.3).materialize(x, y)
    assert dfa.report().saved_bytes == measured(dfa, x, y) <= 0.3 * plain


@pytest.mark.parametrize("budget", [0, pytest.param(1e-6, marks=SLOW)])
def test_infeasible_budget_names_the_lowest(exact, budget):
    x, y = batch(6)
    with pytest.raises(gr.RuleError, match="lowest feasible is") as caught:
        gr.compile(exact[0], memory_budget=budget, example_inputs=(x,), example_targets=(y,))
    lowest = int(caught.value.remedy.rpartition("=")[2].split()[0])
    assert 0 < lowest < exact[3] / 10
    if budget:
        compiled = gr.compile(exact[0], memory_budget=lowest, example_inputs=(x,), example_targets=(y,))
        assert compiled.report().saved_bytes <= lowest


@pytest.mark.parametrize("budget", [-0.5, 1.5, -3, True, "0.3", float("nan")])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(gr.RuleError, match="memory_budget="):
        gr.compile(nn.Linear(2, 2), memory_budget=budget)


@pytest.mark.slow
def test_missing_solver_names_the_extra(exact, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    x, y = batch(6)
    with pytest.raises(gr.GraphRewriteError, match="needs scipy") as caught:
        gr.compile(exact[0], memory_budget=0.5, example_inputs=(x,), example_targets=(y,))
    assert "graphrewrite[plan]" in caught.value.remedy


def test_solver_against_all_combinations():
    """A random knapsack, by brute force."""
    import itertools

    generator = torch.Generator().manual_seed(0)
    number = lambda: float(torch.rand((), generator=generator))  # noqa: E731
    candidates = []
    for _ in range(6):
        choices = [Choice(None, "keep", 1000)]
        choices += [
            Choice(None, "code", int(900 * number()), error=0.05 * number(), time=0.1 * number()) for _ in "abc"
        ]
        candidates.append(Candidate(None, choices))
    for i, one in enumerate(candidates):
        one.saved = type("Saved", (), {"node": i})()
    budget = 2500
    chosen = solve(Problem(candidates, budget), 10.0)

    def cost(numbers):
        return sum(c.choices[j].cost() for c, j in zip(candidates, numbers, strict=True))

    def size(numbers):
        return sum(c.choices[j].nbytes for c, j in zip(candidates, numbers, strict=True))

    assert size(chosen) <= budget
    best = min((n for n in itertools.product(range(4), repeat=6) if size(n) <= budget), key=cost)
    assert cost(chosen) == pytest.approx(cost(best), rel=2e-3)
    fewest = solve(Problem(candidates, -1), 10.0)
    assert size(fewest) == sum(min(c.nbytes for c in one.choices) for one in candidates)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_compress_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x, y = torch.randn(3, 4), torch.randint(0, 4, (3,))
    with pytest.raises(gr.RuleError, match="no codec is named 'int5'"):
        gr.compile(model, compress="int5")
    with pytest.raises(gr.RuleError, match="is no codec"):
        gr.compile(model, compress=3)
    with pytest.raises(gr.RuleError, match="matches no module"):
        gr.compile(model, compress={"encoder": "int8"}, example_inputs=(x,), example_targets=(y,))
    with pytest.raises(gr.RuleError, match="chooses the codecs by itself"):
        gr.compile(model, compress={"0": "int8"}, memory_budget=0.5)


@pytest.mark.slow
def test_demands_are_told_apart(exact):
    x, y = batch(6)
    graph = gr.compile(exact[0], example_inputs=(x,), example_targets=(y,)).graph("aten")
    values = saved_values(graph)
    demands = {one.demand for v in values for one in v.readings}
    assert demands >= {Demand.VALUE, Demand.SIGN}
    assert [v.node for v in values] == [n for n in graph.nodes if n in {v.node for v in values}]


# --- the peak --------------------------------------------------------------------------------------------------------


def peaks(name, budgets):
    """Predicted and measured peak of a case under each budget, from the largest."""
    case = zoo.make(name)
    torch.manual_seed(0)
    x, y = case.batch(16)
    for budget in budgets:
        compiled = gr.compile(case.model, loss=case.loss, memory_budget=budget, verify="off", dynamic=None)
        compiled.materialize(x, y)
        compiled.zero_grad()
        known = [*compiled.parameters(), *compiled.buffers(), *leaves(x, y)]
        yield predicted_peak(compiled), peak_bytes(lambda c=compiled: c.loss(x, y).backward(), known)


DOWN_TO = {
    "mlp": 0.07,
    "lenet": 0.07,
    "resnet": 0.15,
    "vit": 0.07,
    "cnn": 0.1,
    "gpt": 0.1,
    "unet": 0.15,
    "lstm": 0.15,
    **dict.fromkeys(("llama", "gru", "moe", "bert", "gcn", "hf_resnet"), 0.25),
    "sage": 0.4,
}
"""Below, plans that err at most 1 % recompute so much at once that the peak may rise again."""


@pytest.mark.parametrize(
    ("name", "least"),
    [("mlp", 0.15), *[pytest.param(name, least, marks=SLOW) for name, least in DOWN_TO.items()]],
)
def test_peak_is_predicted_and_falls_with_the_budget(name, least):
    """Chains of recomputed values through several blocks would raise it again."""
    last = None
    budgets = (0.6, 0.15) if name == "mlp" and least == 0.15 else (1.0, 0.6, 0.4, 0.25, 0.15, 0.1, 0.07)
    for predicted, measured_bytes in peaks(name, [one for one in budgets if one >= least]):
        assert abs(predicted / measured_bytes - 1) < 0.01
        assert last is None or measured_bytes <= 1.03 * last
        last = measured_bytes
    assert last is not None
