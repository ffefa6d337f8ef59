"""Every Triton kernel against a float64 reference: dtypes, odd sizes, strides, poisoned outputs, refusals.

The kernels run on CUDA where there is a device, else in Triton's interpreter. The references of the operators are
tested against formulas written here.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from graphrewrite.backends.triton import KERNELS, activation, goodness, hadamard, norms, projection, quantise, support
from graphrewrite.passes.compression._packing import unpack
from torch.nn import functional as F

from graphrewrite import random
from graphrewrite.errors import BackendError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write holds numbers that no test takes for a result."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def counter(seed: int = 5, step: int = 3, rank: int = 1) -> torch.Tensor:
    return torch.tensor([seed, step, rank], dtype=torch.int64, device=DEVICE)


def close(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, slack: float = 4.0) -> None:
    """Equal to the exact result up to a few roundings of the dtype, relative to the largest entry."""
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    gap = (actual.double() - exact).abs().max()
    assert gap <= slack * ROUNDING[dtype] * max(exact.abs().max(), 1e-3), f"off by {gap:.3g}"


def test_the_interpreter_or_a_device_is_there():
    assert support.unavailable() == ""


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 37), (2, 3, 16)])
def test_layer_norm(dtype, shape):
    x, g = draw(*shape, dtype=dtype, scale=3.0) + 1, draw(*shape, dtype=dtype)
    weight, bias = draw(shape[-1], dtype=dtype), draw(shape[-1], dtype=dtype) * 0.1
    out, mean, rstd = norms.layer_norm.launch(x, shape[-1:], weight, bias, 1e-5)
    x64, w64, b64 = (t.double().requires_grad_() for t in (x, weight, bias))
    exact = F.layer_norm(x64, shape[-1:], w64, b64, 1e-5)
    close(out, exact.detach(), dtype)
    torch.testing.assert_close(mean.double(), x64.mean(-1, keepdim=True).detach(), atol=1e-5, rtol=1e-5)
    dx, dweight, dbias = norms.layer_norm_backward.launch(g, x, shape[-1:], mean, rstd, weight, bias)
    for actual, wanted in zip(
        (dx, dweight, dbias), torch.autograd.grad(exact, (x64, w64, b64), g.double()), strict=True
    ):
        close(actual, wanted, dtype)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_sharing_norm(dtype, rms):
    """z and rstd alone give the derivative; with a bfloat16 z it is that of the stored z."""
    x, g = draw(5, 23, dtype=dtype, scale=2.0) + 0.5, draw(5, 23, dtype=dtype)
    z, rstd = norms.ms_norm.launch(x, 1, 1e-5, rms)
    x64 = x.double().requires_grad_()
    exact = F.rms_norm(x64, (23,), eps=1e-5) if rms else F.layer_norm(x64, (23,), eps=1e-5)
    close(z, exact.detach(), dtype)
    (wanted,) = torch.autograd.grad(exact, x64, g.double())
    close(norms.ms_norm_backward.launch(g, z, rstd, 1, rms), wanted, dtype, slack=8.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_its_normalised_form_at_once(dtype):
    x, weight, bias = draw(5, 23, dtype=dtype) + 0.5, draw(23, dtype=dtype), draw(23, dtype=dtype)
    for rms, shift in ((False, bias), (True, None)):
        y, z, rstd = norms.ms_norm_affine.launch(x, weight, shift, 1, 1e-5, rms)
        alone, scale = norms.ms_norm.launch(x, 1, 1e-5, rms)
        assert torch.equal(z, alone)
        assert torch.equal(rstd, scale)
        h = x.double()
        exact = F.rms_norm(h, (23,), eps=1e-5) if rms else F.layer_norm(h, (23,), eps=1e-5)
        exact = exact * weight.double() + (0.0 if shift is None else shift.double())
        close(y, exact, dtype)
        close(norms.ms_norm_affine.reference(x, weight, shift, 1, 1e-5, rms)[0], exact, dtype)


def test_norm_reads_strided_rows():
    x = draw(6, 40)[::2, :20]
    z, _ = norms.ms_norm.launch(x, 1, 1e-5, False)
    close(z, F.layer_norm(x.double(), (20,)), torch.float32)
    t = draw(20, 6).t()
    close(norms.ms_norm.launch(t, 1, 1e-5, False)[0], F.layer_norm(t.double(), (20,)), torch.float32)


def test_norm_without_affine_part():
    x, g = draw(3, 12), draw(3, 12)
    out, mean, rstd = norms.layer_norm.launch(x, (12,), None, None, 1e-5)
    close(out, F.layer_norm(x.double(), (12,)), torch.float32)
    dx, dweight, dbias = norms.layer_norm_backward.launch(g, x, (12,), mean, rstd, None, None)
    assert dweight.numel() == dbias.numel() == 0
    x64 = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.layer_norm(x64, (12,)), x64, g.double())
    close(dx, wanted, torch.float32)


# --- goodness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 19), (2, 3, 5, 7), (2, 1100)])
def test_goodness(dtype, shape):
    h, g_squares, g_out = draw(*shape, dtype=dtype), draw(shape[0]), draw(*shape, dtype=dtype)
    squares, out = goodness.ff_goodness.launch(h, 1e-8)
    h64 = h.double().requires_grad_()
    flat = h64.flatten(1)
    exact = flat.square().sum(1)
    normalised = (flat / (flat.square().mean(1, keepdim=True).sqrt() + 1e-8)).view(h64.shape)
    close(squares, exact.detach(), torch.float32)
    close(out, normalised.detach(), dtype)
    for with_out in (True, False):
        loss = (exact * g_squares.double()).sum() + ((normalised * g_out.double()).sum() if with_out else 0.0)
        (wanted,) = torch.autograd.grad(loss, h64, retain_graph=True)
        given = g_out if with_out else None
        close(goodness.ff_goodness_backward.launch(g_squares, given, h, squares, 1e-8), wanted, dtype)


def test_goodness_of_a_dead_row_has_a_finite_gradient():
    h = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)]).to(DEVICE)
    squares, out = goodness.ff_goodness.launch(h, 1e-3)
    assert squares.tolist() == [0.0, 8.0]
    assert torch.equal(out[0], torch.zeros(8, device=DEVICE))
    g = torch.ones_like(h)
    dh = goodness.ff_goodness_backward.launch(torch.ones(2, device=DEVICE), g, h, squares, 1e-3)
    torch.testing.assert_close(dh[0], torch.full((8,), 1000.0, device=DEVICE))
    torch.testing.assert_close(dh, goodness.ff_goodness_backward.reference(torch.ones(2).to(h), g, h, squares, 1e-3))


# --- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("distribution", projection.DISTRIBUTIONS)
@pytest.mark.parametrize(("inner", "features"), [(12, 36), (7, 13)])
def test_random_projection(distribution, inner, features, transposed):
    """The matrix is that of `graphrewrite.random`, whether its rows are whole groups of four numbers or not."""
    size = [features, inner] if transposed else [inner, features]
    drawn = {
        "uniform": lambda: 2 * random.uniform(counter(), 4, size) - 1,
        "signs": lambda: random.signs(counter(), 4, size),
        "normal": lambda: random.normal(counter(), 4, size),
    }[distribution]()
    drawn = drawn.t() if transposed else drawn
    for dtype in DTYPES:
        x = draw(5, inner, dtype=dtype)
        out = projection.random_projection.launch(x, counter(), 4, features, distribution, 0.5, transposed)
        close(out, x.double() @ (drawn * 0.5).to(dtype).double(), dtype)


def test_random_projection_of_a_transposed_operand_is_a_sketch():
    x = draw(9, 5)
    sketch = projection.random_projection.launch(x.t(), counter(), 2, 4, "signs", 1.0, False).t()
    s = random.signs(counter(), 2, [9, 4]).t()
    close(sketch, s.double() @ x.double(), torch.float32)
    assert torch.equal(sketch, projection.random_projection.launch(x.t(), counter(), 2, 4, "signs", 1.0, False).t())
    other = projection.random_projection.launch(x.t(), counter(step=4), 2, 4, "signs", 1.0, False).t()
    assert not torch.equal(sketch, other)


def test_random_projection_keeps_leading_dimensions():
    x = draw(2, 3, 6)
    out = projection.random_projection.launch(x, counter(), 1, 8, "uniform", 1.0, False)
    close(out, x.double() @ (2 * random.uniform(counter(), 1, [6, 8]) - 1).double(), torch.float32)


# --- activations -----------------------------------------------------------------------------------------------------

BORDERS = (-0.4602, 0.0, 0.4602)
LEVELS = torch.tensor([-0.0076, 0.3227, 0.6773, 1.0076])


def intervals(x: torch.Tensor, borders: tuple[float, ...]) -> torch.Tensor:
    edges = torch.tensor(borders, dtype=x.dtype, device=x.device)
    return (x.flatten()[:, None] >= edges).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(activation.ACTIVATIONS))
def test_few_bit_activation(kind, dtype):
    x = draw(7, 13, dtype=dtype, scale=2.0)
    y, codes = activation.few_bit_activation.launch(x, BORDERS, (0, 1, 2, 3), kind, 2)
    close(y, activation.ACTIVATIONS[kind](x.double()), dtype)
    code = intervals(x, BORDERS)
    padded = torch.cat([code, torch.zeros_like(code[-1:])])
    planes = padded.view(4, 23)
    expected = planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6
    assert torch.equal(codes.to(torch.int64), expected)
    g = draw(7, 13, dtype=dtype)
    dx = activation.few_bit_backward.launch(g, codes, LEVELS.to(DEVICE), 2)
    close(dx, g.double() * LEVELS.to(DEVICE).double()[code].view(7, 13), dtype)


@pytest.mark.parametrize("count", [101, 96, 9])
@pytest.mark.parametrize(("bits", "borders"), [(1, 1), (2, 5), (3, 7), (3, 11), (4, 15), (8, 3)])
def test_few_bit_widths(bits, borders, count):
    """Codes that serve several intervals each, of every width: in one plane, and in two for three bits."""
    x, edges = draw(count), tuple(torch.linspace(-1.5, 1.5, borders).tolist())
    codes = tuple((3 * i) % 2**bits for i in range(borders + 1))
    y, packed = activation.few_bit_activation.launch(x, edges, codes, "silu", bits)
    code = torch.tensor(codes, device=DEVICE)[intervals(x, edges)]
    close(y, F.silu(x.double()), torch.float32)
    assert torch.equal(unpack(packed, bits, count).to(torch.int64), code)
    assert torch.equal(activation.few_bit_codes.launch(x, edges, codes, bits), packed)
    assert torch.equal(activation.few_bit_codes.reference(x, edges, codes, bits), packed)
    levels, g = torch.randn(2**bits, device=DEVICE), draw(count)
    dx = activation.few_bit_backward.launch(g, packed, levels, bits)
    assert torch.equal(dx, g * levels[code])
    assert torch.equal(dx, activation.few_bit_backward.reference(g, packed, levels, bits))


# --- group quantisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", quantise.WIDTHS)
@pytest.mark.parametrize(
    ("count", "group", "rotated"), [(256, 32, False), (77, 16, False), (90, 30, False), (250, 32, True), (77, 16, True)]
)
def test_quantisation_is_that_of_the_codec(bits, symmetric, stochastic, count, group, rotated):
    """Bitwise: codes, scales, minima, and what they decode to."""
    for dtype in DTYPES:
        x = draw(count, dtype=dtype) + 0.3
        args = (x, counter(), 6, bits, group, symmetric, stochastic, rotated)
        stored, wanted = quantise.quantize_pack.launch(*args), quantise.quantize_pack.reference(*args)
        assert [t.dtype for t in stored] == [t.dtype for t in wanted]
        for mine, theirs in zip(stored, wanted, strict=True):
            assert torch.equal(mine, theirs)
        back = quantise.unpack_dequantize.launch(stored, [count], dtype, bits, group, symmetric, rotated)
        assert torch.equal(
            back, quantise.unpack_dequantize.reference(wanted, [count], dtype, bits, group, symmetric, rotated)
        )
        if rotated:
            continue
        step = stored[1].double().repeat_interleave(group)[:count]
        limit = (1.0 if stochastic else 0.5) * 1.02 * step + ROUNDING[dtype] * x.double().abs()
        assert ((back.double() - x.double()).abs() <= limit).all()


@pytest.mark.parametrize("bits", quantise.WIDTHS)
def test_stochastic_rounding_is_unbiased(bits):
    """The mean over many draws differs from x by no more than chance would have it."""
    draws = 128
    x = draw(32)
    stored = quantise.quantize_pack.launch(x.repeat(draws), counter(), 6, bits, 32, False, True, False)
    back = quantise.unpack_dequantize.launch(stored, [draws, 32], x.dtype, bits, 32, False, False).double()
    mean, deviation = back.mean(0), back.std(0) / math.sqrt(draws)
    inner = deviation > 1e-7
    z = (mean - x.double())[inner] / deviation[inner]
    assert inner.sum() > 25
    assert z.abs().max() < 4.5
    assert abs(z.mean()) * math.sqrt(len(z)) < 4.0


def test_a_group_that_is_not_finite_decodes_to_nan():
    x = draw(64)
    x[3], x[40] = float("inf"), float("nan")
    for symmetric in (False, True):
        stored = quantise.quantize_pack.launch(x, counter(), 1, 4, 16, symmetric, False, False)
        back = quantise.unpack_dequantize.launch(stored, [64], x.dtype, 4, 16, symmetric, False)
        assert back.isnan().view(4, 16).all(1).tolist() == [True, False, True, False]
        assert back.isnan().view(4, 16).any(1).tolist() == [True, False, True, False]


def test_quantisation_of_a_strided_tensor():
    x = draw(8, 24).t()
    stored = quantise.quantize_pack.launch(x, counter(), 1, 8, 32, False, False, False)
    for mine, theirs in zip(
        stored, quantise.quantize_pack.reference(x, counter(), 1, 8, 32, False, False, False), strict=True
    ):
        assert torch.equal(mine, theirs)


# --- Hadamard --------------------------------------------------------------------------------------------------------


def hadamard_matrix(n: int) -> torch.Tensor:
    entries = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return torch.tensor(entries, dtype=torch.float64, device=DEVICE) / math.sqrt(n)


@pytest.mark.parametrize("group", [4, 16, 64])
def test_hadamard_transform(group):
    for dtype in DTYPES:
        x = draw(3, 2 * group, dtype=dtype)
        out = hadamard.hadamard_transform.launch(x, group)
        exact = (x.double().view(-1, group) @ hadamard_matrix(group)).view(x.shape)
        close(out, exact, dtype)
        close(hadamard.hadamard_transform.reference(x, group), exact, dtype)
        close(hadamard.hadamard_transform.launch(out, group), x.double(), dtype, slack=12.0)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_hadamard_with_quantisation(bits, stochastic):
    x = draw(5, 32)
    codes, steps = hadamard.hadamard_quantize.launch(x, counter(), 3, 16, bits, stochastic)
    top = 2 ** (bits - 1) - 1
    assert codes.abs().max() <= top
    exact = x.double().view(-1, 16) @ hadamard_matrix(16)
    back = codes.double().view(-1, 16) * steps.double()[:, None]
    assert ((back - exact).abs() <= (1.0 if stochastic else 0.5) * 1.02 * steps.double()[:, None]).all()
    wanted, _ = hadamard.hadamard_quantize.reference(x, counter(), 3, 16, bits, stochastic)
    # a sum in another order may fall on the other side of a border
    assert (codes.int() - wanted.int()).abs().max() <= 1
    assert (codes == wanted).double().mean() > 0.95


# --- operators -------------------------------------------------------------------------------------------------------


def examples() -> dict[str, tuple]:
    x, rows = draw(4, 32), torch.ones(4, 1, device=DEVICE)
    codes = quantise.quantize_pack.reference(x, counter(), 1, 4, 32, False, False, False)
    levels = LEVELS.to(DEVICE)
    few = activation.few_bit_codes.reference(x, BORDERS, (0, 1, 2, 3), 2)
    weight = torch.ones(32, device=DEVICE)
    return {
        "layer_norm": (x, [32], weight, weight, 1e-5),
        "layer_norm_backward": (x, x, [32], rows, rows, weight, weight),
        "ms_norm": (x, 1, 1e-5, True),
        "ms_norm_affine": (x, weight, weight, 1, 1e-5, False),
        "ms_norm_backward": (x, x, rows, 1, False),
        "ff_goodness": (x, 1e-8),
        "ff_goodness_backward": (rows[:, 0], x, x, rows[:, 0], 1e-8),
        "random_projection": (x, counter(), 1, 8, "signs", 1.0, False),
        "few_bit_codes": (x, BORDERS, (0, 3, 1, 2), 2),
        "few_bit_activation": (x, BORDERS, (0, 1, 2, 3), "gelu", 2),
        "few_bit_backward": (x, few, levels, 2),
        "quantize_pack": (x, counter(), 1, 4, 32, False, True, False),
        "unpack_dequantize": (codes, [4, 32], torch.float32, 4, 32, False, False),
        "hadamard_transform": (x, 16),
        "hadamard_quantize": (x, counter(), 1, 16, 8, True),
    }


def test_every_operator_has_an_example():
    assert set(examples()) == set(KERNELS)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_operator(name, monkeypatch):
    """The fake tells the truth, the schema holds, and without the interpreter the CPU runs the reference."""
    args = examples()[name]
    op = KERNELS[name].op
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    monkeypatch.setattr(support, "interpreting", lambda: False)
    if DEVICE == "cpu":
        assert "interpreter" in KERNELS[name].why_not(*args)
    expected = KERNELS[name].reference(*args)
    actual = op(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_float64_and_empty_tensors_are_refused_with_the_reason(name):
    args = examples()[name]

    def changed(change):
        return tuple(
            change(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        )  # fmt: skip

    if name == "unpack_dequantize":
        assert "float64" in KERNELS[name].why_not(args[0], [4], torch.float64, 4, 32, False, False)
        return
    assert "float64" in KERNELS[name].why_not(*changed(torch.Tensor.double))
    assert "empty" in KERNELS[name].why_not(*changed(lambda t: t[:0]))
    with pytest.raises(BackendError, match="does not apply"):
        support.require(KERNELS[name], *changed(torch.Tensor.double))


@pytest.mark.parametrize(
    ("kernel", "args", "reason"),
    [
        ("hadamard_transform", lambda: (draw(2, 12), 12), "power of two"),
        ("hadamard_transform", lambda: (draw(2, 12), 8), "not made of groups"),
        ("quantize_pack", lambda: (draw(8), counter(), 1, 3, 8, False, False, False), "3 bits"),
        ("quantize_pack", lambda: (draw(8), counter(), 1, 4, 12, False, False, True), "no power of two"),
        ("few_bit_activation", lambda: (draw(8), BORDERS, (0, 1, 2, 3), "gelu", 1), "need more than 1 bits"),
        ("few_bit_activation", lambda: (draw(8), BORDERS, (0, 1, 2, 3), "mish", 2), "mish"),
        ("few_bit_codes", lambda: (draw(8), BORDERS, (0, 1, 2), 2), "codes for 3"),
        ("few_bit_codes", lambda: (draw(8), BORDERS, (0, 1, 2, 3), 5), "5 bits"),
        ("random_projection", lambda: (draw(2, 3), counter(), 1, 4, "cauchy", 1.0, False), "cauchy"),
        ("ms_norm", lambda: (torch.empty(1, 20000, device=DEVICE), 1, 1e-5, True), "longer than"),
    ],
)
def test_what_a_kernel_declines(kernel, args, reason):
    assert reason in KERNELS[kernel].why_not(*args())


def test_an_empty_tensor_takes_the_reference():
    assert torch.ops.graphrewrite.hadamard_transform(torch.zeros(0, 16, device=DEVICE), 16).shape == (0, 16)
    assert torch.ops.graphrewrite.ms_norm(torch.zeros(0, 16, device=DEVICE), 1, 1e-5, True)[0].shape == (0, 16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with 24 GiB")
def test_more_than_two_to_the_31_elements():
    count = 2**31 + 4096
    x = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3.0
    stored = quantise.quantize_pack.launch(x, counter(), 1, 8, 128, False, False, False)
    back = quantise.unpack_dequantize.launch(stored, [count], x.dtype, 8, 128, False, False)
    assert back[-1].item() == pytest.approx(3.0, rel=0.02)
    assert back[count // 2].item() == 1.0
