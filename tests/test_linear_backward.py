"""Cheaper backward of linear layers: sketches against their expectation and variance, HOT against a loop by blocks."""

from __future__ import annotations

import math

import pytest
import torch
from graphrewrite.passes.compression._sketch import SKETCHES
from graphrewrite.passes.compression.hot import hadamard
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite import textform
from graphrewrite.testing.memory import saved_bytes
from helpers import assert_close, eager_grads, train_step

SLOW = pytest.mark.slow
UNBIASED = 4.0
"""Standard errors within which the mean of a z-test has to lie: one of ten thousand entries is outside by chance."""


def net(dtype=torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).to(dtype)


def batch(n: int = 7, tokens: int = 5):
    return torch.randn(n, tokens, 4).double(), torch.randint(0, 3, (n, tokens))


def flat_loss(out, y):
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def compiled_with(model, compress, x, y, dynamic=None, **options):
    return gr.compile(model, compress=compress, example_inputs=x, example_targets=y, dynamic=dynamic, **options)


def reasons(compiled, name: str) -> str:
    return " | ".join(text for made_by, _, text in compiled.graph().log.entries if made_by == name)


# --- sketches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_are_unbiased(name):
    """E[(S g)ᵀ (S x)] = gᵀ x: a z-test of every entry over 512 steps, at an odd number of rows."""
    rows, k, steps = 9, 4, 256
    x, g = torch.randn(rows, 3).double(), torch.randn(rows, 2).double()
    both = torch.cat([g, x], 1)
    draws = []
    for step in range(steps):
        counter = torch.tensor([5, step, 0])
        small = SKETCHES[name](counter, 2, both, k)
        assert small.shape == (k, 5)
        draws.append(small[:, :2].T @ small[:, 2:])
    found, wanted = torch.stack(draws), g.T @ x
    z = (found.mean(0) - wanted) / (found.std(0) / math.sqrt(steps))
    assert z.abs().max() < UNBIASED
    if name == "gaussian":
        # Var = (|x|² |g|² + |gᵀx|²) / k, summed over all entries
        expected = (x.norm() ** 2 * g.norm() ** 2 + wanted.norm() ** 2) / k
        assert found.var(0).sum() == pytest.approx(expected.item(), rel=0.25)
    # the same numbers again from the same counter, others from another stream
    again = SKETCHES[name](torch.tensor([5, 0, 0]), 2, both, k)
    assert torch.equal(again[:, :2].T @ again[:, 2:], draws[0])
    assert not torch.equal(SKETCHES[name](torch.tensor([5, 0, 0]), 3, both, k), again)


@pytest.mark.parametrize("name", ["rows", "dct", "fft"])
def test_all_rows_of_an_orthonormal_transform_are_exact(name):
    x = torch.randn(9, 4).double()
    small = SKETCHES[name](torch.tensor([1, 2, 0]), 1, x, 9)
    torch.testing.assert_close(small.T @ small, x.T @ x, rtol=1e-12, atol=1e-12)


# --- randomised linear layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sketch", "steps"), [("rademacher", 2), *(pytest.param(s, 256, marks=SLOW) for s in SKETCHES if s != "rows")]
)
def test_weight_gradients_are_those_of_the_sketch(sketch, steps):
    """Gradient by gradient from the formula; the mean of many steps is unbiased; everything else is exact."""
    model, (x, y) = net(), batch()
    compiled = compiled_with(model, f"randomized_linear{{rate=0.3,sketch={sketch}}}", x, y, seed=11)
    exact = eager_grads(model, flat_loss(model(x), y))
    rows, k = 35, 11  # ceil(0.3 * 35)
    with torch.no_grad():
        first = F.gelu(model[0](x)).flatten(0, 1)
        second = F.gelu(model[2](first))
    out = model[4](second).detach()
    top = (out.softmax(-1) - F.one_hot(y.flatten(), 3)) / rows
    draws = []
    for step in range(steps):
        found = train_step(compiled, x, y)
        draws.append(found["2.weight"])
        for name in ("0.weight", "0.bias", "2.bias", "4.bias"):
            assert_close({name: found[name]}, {name: exact[name]}, rtol=1e-12)
        if step < 2:
            # the counter is (seed, step, rank); of the two streams one is this layer's
            near = [
                (SKETCHES[sketch](torch.tensor([11, step, 0]), s, top, k).T)
                @ SKETCHES[sketch](torch.tensor([11, step, 0]), s, second, k)
                for s in (1, 2)
            ]
            assert min((n - found["4.weight"]).norm() for n in near) < 1e-12
    if steps > 2:
        stack = torch.stack(draws)
        z = (stack.mean(0) - exact["2.weight"]) / (stack.std(0) / steps**0.5)
        assert (z.abs() < 3).double().mean() >= 0.95
        assert z.abs().max() < UNBIASED + 0.5
    assert "it reads an input, which is not stored" in reasons(compiled, "randomized_linear")
    report = compiled.report().saved_bytes
    # the arguments of GELU, the loss's own, two sketches, and the counter's three numbers
    assert report == 8 * 35 * (6 + 5) + 8 * (35 * 3 + 1) + 8 * k * (6 + 5) + 24
    assert report == saved_bytes(lambda: compiled.loss(x, y), [*model.parameters(), x, y])


def test_every_token_is_backpropagation_and_the_batch_may_change():
    """At rate 1 a sample of the rows is all of them. Three layers that read one tensor share one sketch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q, self.k = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3, bias=False)

        def forward(self, x):
            h = F.gelu(self.a(x))
            return self.q(h) + self.k(h)

    model, (x, y) = Net().double(), batch()
    compiled = compiled_with(model, "randomized_linear{rate=1,sketch=rows}", x, y, dynamic="auto")
    for n in (7, 4):
        x, y = batch(n)
        assert_close(train_step(compiled, x, y), eager_grads(model, flat_loss(model(x), y)), rtol=1e-12)
    assert compiled._captures == {"loss": 1}
    stored = [s for s in compiled.program().partition.saved if s.nbytes == 7 * 5 * 6 * 8]
    assert len(stored) == 2  # GELU's argument and the one sketch
    x, y = batch(0)
    assert all(g.shape == p.shape for g, p in zip(train_step(compiled, x, y).values(), model.parameters(), strict=True))


# --- HOT -----------------------------------------------------------------------------------------------------------


def test_hadamard_rows_are_orthonormal_and_in_order_of_frequency():
    for size in (1, 2, 16, 64):
        matrix = hadamard(size)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double())
        changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
        assert changes.tolist() == list(range(size))


def rounded(rows: torch.Tensor, bits: int) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    out = torch.zeros_like(rows)
    for i, row in enumerate(rows):
        scale = row.abs().max() / top
        out[i] = (row / scale).round() * scale if scale > 0 else row
    return out


def in_blocks(rows: torch.Tensor, rank: int, block: int = 16) -> torch.Tensor:
    matrix = hadamard(block)
    parts = []
    for start in range(0, len(rows), block):
        part = torch.zeros(block, rows.shape[1]).double()
        part[: len(rows[start : start + block])] = rows[start : start + block]
        parts.append(matrix[:rank] @ part)
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("options", "rank", "bits", "cotangent_bits"),
    [
        ("rank=8", 8, 8, 4),
        pytest.param("rank=16,input_bits=null,weight_bits=null", 16, None, None, marks=SLOW),
        pytest.param("rank=5,weight_bits=4,input_bits=6", 5, 4, 6, marks=SLOW),
    ],
)
def test_hot_is_its_formula(options, rank, bits, cotangent_bits):
    """By a loop over blocks of 16 tokens, at 35 tokens."""
    model, (x, y) = net(), batch()
    compiled = compiled_with(model, f"hot{{{options}}}", x, y)
    found = train_step(compiled, x, y)
    flat = x.flatten(0, 1)
    a = model[0](flat).detach().requires_grad_()
    h = F.gelu(a)
    b = model[2](h.detach()).detach().requires_grad_()
    top_in = F.gelu(b)
    out = model[4](top_in.detach())
    g = ((out.softmax(-1) - F.one_hot(y.flatten(), 3)) / 35).detach()
    grads = {}
    for name, layer, into, below, through in (("4", model[4], top_in, b, top_in), ("2", model[2], h, a, h)):
        left, right = in_blocks(g, rank), in_blocks(into.detach(), rank)
        if bits:
            left, right = rounded(left, bits), rounded(right, bits)
        grads[f"{name}.weight"], grads[f"{name}.bias"] = left.T @ right, g.sum(0)
        weight = layer.weight.detach()
        if cotangent_bits:
            # along the outputs: blocks of 16, filled up with zeros
            wide = rounded(in_blocks(g.T, 16).T, cotangent_bits), rounded(in_blocks(weight, 16).T, cotangent_bits)
            g = wide[0] @ wide[1].T
        else:
            g = g @ weight
        (g,) = torch.autograd.grad(through, below, g)
    grads["0.weight"], grads["0.bias"] = g.T @ flat, g.sum(0)
    assert_close(found, grads, rtol=1e-10)
    exact = eager_grads(model, flat_loss(model(x), y))
    if bits is None:
        assert_close(found, exact, rtol=1e-10)
    else:
        assert_close({"4.bias": found["4.bias"]}, {"4.bias": exact["4.bias"]}, rtol=1e-12)
        report = compiled.report().saved_bytes
        stored = math.ceil(3 * rank * 6 * bits / 8) + math.ceil(3 * rank * 5 * bits / 8) + 2 * 3 * rank * 8
        assert report == 8 * 35 * (6 + 5) + 8 * (35 * 3 + 1) + stored


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randomized_linear{rate=0}", "rate=0} is out of range"),
        ("randomized_linear{rate=1.5}", "out of range"),
        ("randomized_linear{sketch=sobol}", "knows no sketch"),
        ("hot{input_bits=1}", "input_bits=1} is out of range"),
        ("hot{weight_bits=9}", "weight_bits=9} is out of range"),
        ("hot{block=12}", "no power of two"),
        ("hot{rank=17}", "rank=17} is out of range"),
    ],
)
def test_refuses_options(text, message):
    with pytest.raises(gr.RuleError, match=message):
        textform.build("codec", text).requires(None)
