"""Backends: what they compute, what they compile and how often, what took each node, and how they refuse."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from graphrewrite.backends import inductor, triton
from torch import nn

import graphrewrite as gr
from graphrewrite import _compat, random
from graphrewrite.errors import BackendError
from graphrewrite.testing import gradients, zoo
from helpers import train_step

WITH_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def assert_near(actual: dict, expected: dict) -> None:
    """Equal up to float32 rounding.

    Of sums that cancel (the gradient of a bias in front of a batch norm is 0) nothing but rounding is left: 1e-6 of the
    model's largest gradient, 8 times what one rounding of that costs.
    """
    scale = max(g.abs().max() for g in expected.values() if g is not None)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None:
            gap = (actual[name] - gradient).abs().max()
            assert gap <= 1e-5 * max(gradient.abs().max(), 0.1 * scale), f"{name} is off by {gap:.3g}"


def compare(name: str, rule: str, backend: str, sizes: tuple[int, ...] | None = None) -> gr.CompiledModule:
    """Losses, gradients and buffers of a backend against the eager one, with the same random numbers."""
    case = zoo.make(name)
    ours = gr.compile(case.model, rule, loss=case.loss, backend=backend)
    theirs = gr.compile(copy.deepcopy(case.model), rule, loss=case.loss)
    for step, size in enumerate(sizes or case.sizes[:2]):
        x, y = case.batch(size)
        losses, found = [], []
        for compiled in (ours, theirs):
            torch.manual_seed(step)
            compiled.module.zero_grad()
            loss = compiled.loss(x, y)
            loss.backward()
            losses.append(loss.detach())
            found.append(gradients(compiled.module))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
        assert_near(*found)
    for mine, other in zip(ours.module.buffers(), theirs.module.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    return ours


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


# --- Inductor --------------------------------------------------------------------------------------------------------


def test_inductor_is_near_eager_and_compiles_once_for_ten_batch_sizes():
    before = inductor.compiled_stages
    compiled = compare("mlp", "bp", "inductor", sizes=(4, 7, 2, 3, 5, 6, 8, 9, 16, 33))
    # one forward and one backward, whatever the batch
    assert inductor.compiled_stages - before == 2
    report = compiled.report()
    assert report.backend_coverage == {"inductor": sum(report.backend_coverage.values())}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor is given runs as it is: everything but Inductor itself is tested, in a tenth of the time."""

    def as_it_is(module: torch.fx.GraphModule, inputs: list, _settings: dict, *, is_backward: bool):
        assert len(inputs) == sum(n.op == "placeholder" for n in module.graph.nodes)
        return _compat.boxed(module)

    monkeypatch.setattr(inductor, "inductor_code", as_it_is)


@pytest.mark.parametrize(
    ("rule", "options", "stages"),
    [
        ("dfa", {}, 2),
        pytest.param("mono_forward", {}, 2, marks=pytest.mark.slow),
        pytest.param("ff", {}, 2, marks=pytest.mark.slow),
        # two samples are a single group of the narrowest tensor: one graph for them, one for all others
        ("bp", {"compress": "int8{group=16}"}, 4),
        pytest.param("bp", {"compress": "fewbit"}, 2, marks=pytest.mark.slow),
        pytest.param("bp", {"split_backward": True}, 3, marks=pytest.mark.slow),
    ],
)
def test_ten_batch_sizes_compile_every_stage_at_most_twice(rule, options, stages, uncompiled):
    model = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 3))
    before = inductor.compiled_stages
    ours = gr.compile(model, rule, backend="inductor", blocks="layers", **options)
    theirs = gr.compile(copy.deepcopy(model), rule, blocks="layers", **options)
    for size in (4, 7, 2, 3, 5, 6, 8, 9, 16, 33):
        x, y = torch.randn(size, 12), torch.randint(0, 3, (size,))
        found = []
        for compiled in (ours, theirs):
            compiled.module.zero_grad()
            compiled.loss(x, y).backward()
            if options.get("split_backward"):
                compiled.backward_weight()
            found.append(gradients(compiled.module))
        assert_near(*found)
    assert inductor.compiled_stages - before == stages


def test_values_that_end_within_a_group():
    """Inductor splits a loop over 96 elements in groups of 64 into one over 64, and leaves the rest as it was."""
    model = nn.Sequential(nn.Linear(8, 96), nn.GELU(), nn.Linear(96, 3))
    x, y = torch.randn(1, 8), torch.tensor([1])
    found = []
    for backend in ("inductor", "eager"):
        compiled = gr.compile(model, compress="int8{group=64}", backend=backend, dynamic=None)
        model.zero_grad()
        compiled.loss(x, y).backward()
        found.append(gradients(model))
    assert_near(*found)


@pytest.mark.parametrize("name", ["cnn", pytest.param("gcn", marks=pytest.mark.slow)])
def test_what_inductor_is_given(name, uncompiled):
    """Decomposed stages; convolutions with batch-norm and dropout: the numbers come from torch's global generator."""
    compiled = compare(name, "bp", "inductor", sizes=(4,))
    dropout = [row for row in compiled.report().coverage if "random" in row.reason]
    assert len(dropout) == (1 if name == "cnn" else 0)


@pytest.mark.parametrize("rule", ["dfa", pytest.param("ff", marks=pytest.mark.slow)])
def test_rules_as_inductor_is_given_them(rule, uncompiled):
    compare("mlp", rule, "inductor", sizes=(4,))


def test_two_stages_as_inductor_is_given_them(uncompiled):
    case = zoo.make("mlp")
    ours = gr.compile(case.model, split_backward=True, backend="inductor")
    theirs = gr.compile(copy.deepcopy(case.model))
    x, y = case.batch(4)
    for compiled in (ours, theirs):
        compiled.loss(x, y).backward()
    ours.backward_weight()
    assert_near(gradients(ours.module), gradients(theirs.module))


def test_local_rule_on_inductor():
    compiled = compare("mlp", "mono_forward", "inductor", sizes=(4, 6))
    # the hidden blocks' gradients are made in the forward, and only scaled in the backward
    assert any(saved.carried for saved in compiled.program().partition.saved)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["bp", "dfa", "ff", "mono_forward"])
@pytest.mark.parametrize("name", zoo.names())
def test_model_matrix_on_inductor(name, rule):
    if rule != "bp" and name not in ("mlp", "cnn", "resnet", "gpt", "gcn"):
        pytest.skip("other rules: one representative per family")
    if rule == "ff" and name == "gpt":
        pytest.skip("ff refuses integer inputs")
    compare(name, rule, "inductor")


def test_layouts_from_outside_are_brought_in_line():
    """Transposed inputs, and cotangents that are expanded or transposed, are no other graph."""
    before = inductor.compiled_stages
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    compiled = gr.compile(model, backend="inductor")
    reference = copy.deepcopy(model)
    x = torch.randn(4, 6)
    for cotangent in (torch.randn(4, 3), torch.randn(3, 4).t(), torch.ones(1, 1).expand(4, 3)):
        model.zero_grad()
        reference.zero_grad()
        compiled(x).backward(cotangent)
        reference(x).backward(cotangent)
        assert_near(gradients(model), gradients(reference))
    assert inductor.compiled_stages - before == 2


def test_inductor_without_a_compiler_names_the_remedy(monkeypatch):
    monkeypatch.setattr(inductor, "cpp_compiler", lambda: None)
    compiled = gr.compile(perceptron(), backend="inductor")
    with pytest.raises(BackendError, match=r"no C\+\+ compiler[\s\S]*install g\+\+"):
        compiled.loss(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))


def test_inductor_says_which_stage_it_cannot_compile(monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("no lowering for this\nsecond line")

    monkeypatch.setattr(inductor, "inductor_code", broken)
    compiled = gr.compile(perceptron(), backend="inductor")
    with pytest.raises(BackendError, match="forward stage: RuntimeError: no lowering for this"):
        compiled.loss(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))


def test_random_operators_are_not_decomposed():
    table = _compat.inductor_decompositions(inductor.SETTINGS)
    assert torch.ops.aten.native_layer_norm.default in table
    assert torch.ops.aten.native_dropout.default not in table
    assert torch.ops.aten.rand_like.default not in table


# --- Triton ----------------------------------------------------------------------------------------------------------


@WITH_TRITON
def test_triton_takes_what_its_checkers_accept():
    model = perceptron()
    compiled = gr.compile(model, backend="triton")
    reference = gr.compile(copy.deepcopy(model))
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    assert_near(train_step(compiled, x, y), train_step(reference, x, y))
    report = compiled.report()
    taken = {(row.kernel, row.operator, row.stage, row.module) for row in report.coverage if row.backend == "triton"}
    assert taken == {
        ("layer_norm", "native_layer_norm", "forward", "1"),
        ("layer_norm_backward", "native_layer_norm_backward", "backward", "1"),
    }
    assert {row.reason for row in report.coverage if row.backend == "eager"} == {"no kernel for this operator"}
    assert report.backend_coverage["triton"] == 2
    assert "1 by the kernel layer_norm_backward" in str(report)


@WITH_TRITON
@pytest.mark.parametrize(
    "codec",
    [
        pytest.param("hadamard{group=16}", marks=pytest.mark.slow),
        "int4{group=16}",
        'int8{group=16,rounding="stochastic"}',
    ],
)
def test_codecs_are_kernels_and_the_same_bits(codec):
    """Gradients from saved tensors that a kernel encoded are those of the codec, bit by bit."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(6, 16), torch.tensor([0, 1, 2, 0, 1, 1])
    ours = gr.compile(model, backend="triton", compress=codec)
    theirs = gr.compile(copy.deepcopy(model), compress=codec)
    exact = gr.compile(copy.deepcopy(model))
    for _ in range(2):
        found, expected = train_step(ours, x, y), train_step(theirs, x, y)
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
    assert not torch.equal(found["2.weight"], train_step(exact, x, y)["2.weight"])
    taken = [row for row in ours.report().coverage if row.backend == "triton"]
    assert {row.kernel for row in taken} == {"quantize_pack", "unpack_dequantize"}
    assert ours.report().saved_bytes == theirs.report().saved_bytes


def taken_by(compiled: gr.CompiledModule) -> set[tuple[str, str]]:
    """The kernels that took nodes, with the stages."""
    return {(row.kernel, row.stage) for row in compiled.report().coverage if row.backend == "triton"}


def pair_of(model: nn.Module, rule: str = "bp", **options) -> tuple[gr.CompiledModule, gr.CompiledModule]:
    """A model compiled with our kernels, and a copy of it compiled eagerly."""
    return (
        gr.compile(model, rule, backend="triton", **options),
        gr.compile(copy.deepcopy(model), rule, **options),
    )


@WITH_TRITON
@pytest.mark.parametrize(
    ("activation", "compress", "fused"),
    [
        (nn.GELU(), "fewbit", True),
        pytest.param(nn.GELU("tanh"), "fewbit{bits=4}", True, marks=pytest.mark.slow),
        pytest.param(nn.SiLU(), "approx_bp", True, marks=pytest.mark.slow),
        (nn.Softplus(), "fewbit{bits=2}", False),
    ],
)
def test_few_bit_derivatives_are_kernels(activation, compress, fused):
    """The activation and the code of its derivative are one kernel; without one for the activation, the code is."""
    ours, theirs = pair_of(nn.Sequential(nn.Linear(6, 9), activation, nn.Linear(9, 3)), compress=compress)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    assert_near(train_step(ours, x, y), train_step(theirs, x, y))
    first = "few_bit_activation" if fused else "few_bit_codes"
    assert taken_by(ours) == {(first, "forward"), ("few_bit_backward", "backward")}
    assert ours.report().saved_bytes == theirs.report().saved_bytes
    counts = [row.kernel for row in ours.report().coverage].count(first)
    assert counts == (2 if fused else 1)


class RootMeanSquare(nn.Module):
    """RMS norm as Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@WITH_TRITON
@pytest.mark.parametrize(
    ("norm", "kernels"),
    [
        (nn.LayerNorm(8), {("ms_norm_affine", "forward"), ("ms_norm_backward", "backward")}),
        (nn.RMSNorm(8), {("ms_norm", "forward"), ("ms_norm_backward", "backward")}),
        (RootMeanSquare(8), {("ms_norm_backward", "backward")}),
    ],
    ids=["layer_norm", "rms_norm", "written_out"],
)
def test_memory_sharing_norms_are_kernels(norm, kernels):
    """A layer norm and what is kept of it are one kernel."""
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    ours, theirs = pair_of(model, compress="ms_norm")
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    assert_near(train_step(ours, x, y), train_step(theirs, x, y))
    assert taken_by(ours) == kernels
    assert ours.report().saved_bytes == theirs.report().saved_bytes


@WITH_TRITON
@pytest.mark.parametrize("sketch", ["rademacher", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_sketches_of_linear_layers_are_kernels(sketch):
    """The same random numbers, and no random matrix in the graph."""
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 3))
    ours, theirs = pair_of(model, compress=f"randomized_linear{{rate=0.5,sketch={sketch}}}")
    for size in (6, 9):
        x, y = torch.randn(size, 6), torch.randint(0, 3, (size,))
        assert_near(train_step(ours, x, y), train_step(theirs, x, y))
    assert taken_by(ours) == {("random_projection", "forward"), ("random_projection", "backward")}
    operators = [row.operator for row in ours.report().coverage]
    assert "philox" not in operators
    assert "philox" in [row.operator for row in theirs.report().coverage]


@WITH_TRITON
@pytest.mark.parametrize("goodness", ["sum", pytest.param("mean", marks=pytest.mark.slow)])
def test_forward_forward_is_on_kernels(goodness):
    """Goodness and length normalisation of a block's output are one kernel, and so is their gradient."""
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3))
    ours, theirs = pair_of(model, f"ff{{goodness={goodness}}}", blocks="layers")
    for _ in range(2):
        x, y = torch.randn(5, 12), torch.tensor([0, 1, 2, 0, 1])
        assert_near(train_step(ours, x, y), train_step(theirs, x, y))
        torch.testing.assert_close(ours.losses, theirs.losses)
    assert taken_by(ours) == {("ff_goodness", "forward"), ("ff_goodness_backward", "forward")}
    part = ours.program().partition
    launched = [node.target for node in triton.with_kernels(part.forward, part).graph.nodes]
    # two hidden blocks: in the positive, the negative and the neutral pass; taught in two of them
    assert launched.count(triton.goodness.ff_goodness.launch) == 6
    assert launched.count(triton.goodness.ff_goodness_backward.launch) == 4


@WITH_TRITON
@pytest.mark.parametrize("distribution", ["uniform", pytest.param("normal", marks=pytest.mark.slow)])
def test_generated_feedback_is_drawn_in_the_product(distribution):
    """No feedback weights are stored, and with our kernels they are not in the graph either."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    ours, theirs = pair_of(model, f"dfa{{generated=true,distribution={distribution}}}", blocks="layers")
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    first = train_step(theirs, x, y)
    assert_near(train_step(ours, x, y), first)
    # the same weights at every step
    assert_near(train_step(theirs, x, y), first)
    assert not dict(theirs.rule_state)
    assert taken_by(ours) == {("random_projection", "backward")}
    assert "philox" not in [row.operator for row in ours.report().coverage]
    h = torch.tanh(model[2](torch.tanh(model[0](x))))
    error = (torch.softmax(model[4](h), 1) - nn.functional.one_hot(y, 3)) / 5
    delta = first["2.bias"]
    matrices = [(2 * random.uniform(torch.tensor([0, 0, 0]), s, [3, 9]) - 1) / 3 for s in range(1, 5)]
    if distribution == "uniform":
        found = [((error @ matrix) * (1 - h * h)).sum(0) for matrix in matrices]
        assert any(torch.allclose(one, delta, atol=1e-6) for one in found)


@WITH_TRITON
def test_triton_on_batches_that_are_empty_or_strided():
    """No kernel runs on an empty batch, and the report says why; strided inputs and cotangents are read as they are."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    ours, theirs = pair_of(model, compress="fewbit{bits=2}")
    strided = torch.randn(6, 10).t()[::2]
    for x, cotangent in ((strided, torch.randn(4, 5).t()), (torch.randn(0, 6), torch.randn(0, 4))):
        found = []
        for compiled in (ours, theirs):
            compiled.module.zero_grad()
            compiled(x).backward(cotangent)
            found.append(gradients(compiled.module))
        assert_near(*found)
        if len(x):
            assert taken_by(ours)
    assert not taken_by(ours)
    assert any(row.reason == "the tensor is empty" for row in ours.report().coverage)


@WITH_TRITON
def test_triton_leaves_float64_to_eager_and_says_why():
    compiled = gr.compile(perceptron().double(), backend="triton")
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    reference = copy.deepcopy(compiled.module)
    ours = train_step(compiled, x, y)
    for name, gradient in train_step(gr.compile(reference), x, y).items():
        assert torch.equal(ours[name], gradient)
    taken = compiled.report().coverage
    assert not any(one.backend == "triton" for one in taken)
    assert any("float64" in one.reason for one in taken if one.kernel == "layer_norm")


def test_triton_without_a_device_is_an_error_unless_a_fallback_is_allowed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, x, y = perceptron(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    with pytest.raises(BackendError, match=r"cannot run here[\s\S]*fallback='eager'"):
        gr.compile(model, backend="triton").loss(x, y)
    compiled = gr.compile(model, backend="triton", fallback="eager")
    reference = copy.deepcopy(model)
    for name, gradient in train_step(gr.compile(reference), x, y).items():
        assert torch.equal(train_step(compiled, x, y)[name], gradient)
    report = compiled.report()
    assert set(report.backend_coverage) == {"eager"}
    assert "not by triton: backend 'triton' cannot run here" in str(report)


def test_an_unknown_fallback_is_refused():
    with pytest.raises(gr.GraphRewriteError, match="fallback"):
        gr.compile(perceptron(), fallback="slow")
