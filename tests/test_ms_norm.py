"""Memory-sharing norms: the gradients of autograd up to round-off, with fewer bytes kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing.memory import saved_bytes
from helpers import eager_grads, train_step

SLOW = pytest.mark.slow


class WrittenRMSNorm(nn.Module):
    """As in Llama and T5, with the casts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class Product(nn.Module):
    """A linear layer as GPT-2 writes it: addmm with the weight stored as (in, out), tokens in one dimension."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside) / inside**0.5)
        self.bias = nn.Parameter(torch.zeros(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Stack(nn.Module):
    """Pre-norm branches: one norm in front of two linear layers, one in front of one of GPT-2's."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.first, self.second = norm(8), norm(8)
        self.q, self.k = (nn.Linear(8, 8, bias=b) for b in (True, False))
        self.head = Product(8, 3)

    def forward(self, x):
        x = self.embed(x)
        h = self.first(x)
        x = x + self.q(h) + 2 * self.k(h)
        return self.head(self.second(x))


NORMS = {
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "written": WrittenRMSNorm,
    "plain": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "without_bias": lambda width: nn.LayerNorm(width, bias=False),
}


def stack(name: str, dtype=torch.float64) -> Stack:
    model = Stack(NORMS[name]).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def batch(dtype=torch.float64):
    return torch.randn(3, 5, 4, dtype=dtype), torch.randint(0, 3, (3, 5))


def flat_loss(out, y):
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def compiled_with(model, compress, x, y, **options):
    return gr.compile(model, compress=compress, example_inputs=x, example_targets=y, **{"dynamic": None, **options})


def reasons(compiled) -> str:
    return " | ".join(text for made_by, _, text in compiled.graph().log.entries if made_by == "ms_norm")


def assert_near(found, expected, tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("name", [n if n in ("layer_norm", "written") else pytest.param(n, marks=SLOW) for n in NORMS])
def test_gradients_are_exact_and_fewer_bytes_are_kept(name):
    model, (x, y) = stack(name), batch()
    compiled = compiled_with(model, "ms_norm", x, y)
    assert reasons(compiled) == ""
    # the written-out norm computes in float32, whatever it is given
    tolerance = 1e-6 if name == "written" else 1e-13
    assert_near(train_step(compiled, x, y), eager_grads(model, flat_loss(model(x), y)), tolerance)
    assert torch.equal(compiled.loss(x, y), flat_loss(model(x), y))
    exact = compiled_with(model, None, x, y)
    saved = compiled.report().saved_bytes
    assert saved == saved_bytes(lambda: compiled.loss(x, y), [*model.parameters(), x, y])
    tokens, size = 15, 4 if name == "written" else 8
    # of each of two norms: x and the mean are gone; the written-out one kept z beside x and y
    spared = exact.report().saved_bytes - saved
    assert spared >= 2 * tokens * 8 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW)])
def test_other_precisions(dtype):
    model, (x, y) = stack("layer_norm", dtype), batch(dtype)
    compiled = compiled_with(model, "ms_norm", x, y)
    wide = copy.deepcopy(model).double()
    expected = eager_grads(wide, flat_loss(wide(x.double()), y))
    found = train_step(compiled, x, y)
    assert_near({n: g.double() for n, g in found.items()}, expected, 0.05 if dtype == torch.bfloat16 else 1e-5)


def test_dynamic_batch_and_frozen_parameters():
    model = stack("rms_norm")
    for p in (model.first.weight, model.k.weight, model.head.weight):
        p.requires_grad_(False)
    x, y = batch()
    compiled = compiled_with(model, "ms_norm", x, y, dynamic="auto")
    for _ in range(2):
        assert_near(train_step(compiled, x, y), eager_grads(model, flat_loss(model(x), y)), 1e-12)
        x, y = torch.randn(2, 7, 4).double(), torch.randint(0, 3, (2, 7))
    assert compiled._captures == {"loss": 1}
    assert "no linear layer keeps its output" in reasons(compiled)  # the one in front of the frozen weight


def test_says_why_a_norm_was_not_taken():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
            self.n1, self.n2, self.n3 = (nn.LayerNorm(s) for s in (8, (2, 8), 8))
            self.n4 = nn.BatchNorm1d(2)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = F.gelu(self.n1(self.a(x)))  # GELU keeps what the norm returns
            x = self.b(self.n2(self.b(x)))  # two dimensions
            x = self.c(self.n4(x))
            return self.head(self.n3(x))  # fine

    model = Net().double()
    x, y = torch.randn(4, 2, 8).double(), torch.randint(0, 3, (4, 2))
    compiled = compiled_with(model, "ms_norm", x, y)
    said = reasons(compiled)
    assert "%gelu, which is no linear layer, keeps its output" in said
    assert "more than the last dimension" in said
    assert "only layer norm and RMS norm" in said
    again = copy.deepcopy(model)  # batch statistics move with every forward
    assert_near(train_step(compiled, x, y), eager_grads(again, flat_loss(again(x), y)), 1e-12)


@SLOW
def test_with_a_codec_and_a_sketch():
    """The linear layer's input is a norm's: the first pass that comes takes it, the second says so."""
    model, (x, y) = stack("layer_norm"), batch()
    compiled = compiled_with(model, ["ms_norm", "randomized_linear", "int8{group=64}"], x, y)
    log = [(made_by, text) for made_by, _, text in compiled.graph().log.entries]
    assert ("randomized_linear", "its weight gradient was replaced already") in log
    found, exact = train_step(compiled, x, y), eager_grads(model, flat_loss(model(x), y))
    assert_near(found, exact, 0.05)
