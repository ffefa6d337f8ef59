"""Approximate derivatives of activations: against models that hold the table as a custom function of their own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from graphrewrite.passes.compression._packing import pack, packed_size, unpack
from graphrewrite.passes.compression._table_backward import encode
from graphrewrite.passes.compression.approx_bp import PUBLISHED, published_table
from graphrewrite.passes.compression.fewbit import FewBit
from graphrewrite.passes.compression.tables import table
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite import textform
from graphrewrite.testing.memory import saved_bytes
from helpers import assert_close, eager_grads, train_step
from test_fewbit_tables import BITS, FUNCTIONS

SLOW = pytest.mark.slow


class Written(nn.Module):
    """GELU by tanh, written out as in GPT-2: nine operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return written(x)


def written(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Act(nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


class ByTable(torch.autograd.Function):
    """The oracle: the function forward, the table's derivative backward."""

    @staticmethod
    def forward(ctx, x, fn, found):
        ctx.save_for_backward(x)
        ctx.found = found
        return fn(x).clone()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        found = ctx.found
        number = sum((x >= border).long() for border in found.borders)
        slope = torch.zeros_like(x)
        for i, code in enumerate(found.codes):
            slope = torch.where(number == i, found.levels[code], slope)
        return g * slope, None, None


def by_table(fn, found):
    return lambda x: ByTable.apply(x, fn, found)


def net(*acts, dtype=torch.float64, width: int = 6) -> nn.Sequential:
    """Linear layers of weights big enough to reach all levels, with activations between them."""
    layers: list[nn.Module] = [nn.Linear(4, width)]
    for act in acts:
        layers += [act if isinstance(act, nn.Module) else Act(act), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.Linear(width, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def batch(n: int = 7, dtype=torch.float64):
    return torch.randn(n, 4, dtype=dtype), torch.randint(0, 3, (n,))


def compiled_with(model, compress, x, y, rule="bp", dynamic=None, **options):
    return gr.compile(model, rule, compress=compress, example_inputs=x, example_targets=y, dynamic=dynamic, **options)


def with_tables(model: nn.Sequential, fns, tables) -> nn.Sequential:
    """A copy of a net whose activations have the tables' derivatives."""
    other = copy.deepcopy(model)
    places = [i for i, m in enumerate(other) if not isinstance(m, nn.Linear)]
    for place, fn, found in zip(places, fns, tables, strict=True):
        other[place] = Act(by_table(fn, found))
    return other


def oracle(model, fns, tables, x, y) -> dict[str, torch.Tensor]:
    other = with_tables(model, fns, tables)
    return eager_grads(other, F.cross_entropy(other(x), y))


def reasons(compiled, name: str) -> list[str]:
    return [text for made_by, _, text in compiled.graph().log.entries if made_by == name]


# --- codes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_codes_name_the_levels_of_the_table(name):
    """Every function and size: what comes back from packed codes is the table's derivative, bit by bit."""
    x = torch.cat([3 * torch.randn(1001), torch.tensor([-1e30, 1e30, math.inf, -math.inf, 0.0])]).double()
    for bits in BITS:
        found = table(FUNCTIONS[name], bits)
        at = torch.cat([x, torch.tensor(found.borders, dtype=torch.float64)])
        codes = encode(found, at)
        assert codes.dtype == torch.uint8
        packed = pack(codes, bits)
        assert packed.numel() == packed_size(at.numel(), bits) <= at.numel() * bits / 8 + 3
        levels = torch.tensor(found.levels, dtype=torch.float64)[unpack(packed, bits, at.numel()).long()]
        np.testing.assert_array_equal(levels.numpy(), found.derivative(at.numpy()))
        # no code of NaN spoils its neighbours
        assert encode(found, torch.tensor([math.nan])).item() < 2**bits


# --- whole models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "bits"),
    [(("softsign", "selu"), 2), *(pytest.param(tuple(FUNCTIONS), b, marks=SLOW) for b in BITS)],
    ids=str,
)
def test_every_function(names, bits):
    """Thirteen activations in one net, gradient by gradient; two of them by default."""
    fns = [FUNCTIONS[name] for name in names]
    model, (x, y) = net(*fns), batch()
    compiled = compiled_with(model, f"fewbit{{bits={bits},always=true}}", x, y)
    expected = oracle(model, fns, [table(fn, bits) for fn in fns], x, y)
    assert_close(train_step(compiled, x, y), expected, rtol=1e-9)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    assert (expected["0.weight"] - exact["0.weight"]).norm() > 1e-3 * exact["0.weight"].norm()


@pytest.mark.parametrize("bits", [3, *(pytest.param(b, marks=SLOW) for b in (1, 4))])
def test_gradients_by_hand(bits):
    """A small net in float64, the written-out GELU with it, for sizes the other test leaves to the slow run."""
    fns = [F.gelu, written]
    model, (x, y) = net(F.gelu, Written()), batch()
    compiled = compiled_with(model, f"fewbit{{bits={bits},weight=normal}}", x, y)
    expected = oracle(model, fns, [table(fn, bits, weight="normal") for fn in fns], x, y)
    found = train_step(compiled, x, y)
    assert_close(found, expected, rtol=1e-9)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    for name in ("4.weight", "4.bias", "5.weight", "5.bias"):  # nothing was replaced behind them
        assert torch.equal(found[name], exact[name])
    # the outputs are the model's, in every mode
    assert torch.equal(compiled(x), model(x))
    compiled.eval()
    assert torch.equal(compiled(x), model(x))
    with torch.no_grad():
        assert torch.equal(compiled.loss(x, y), F.cross_entropy(model(x), y))


def test_error_falls_with_bits():
    model, (x, y) = net(F.gelu, F.silu), batch(64)
    exact = eager_grads(model, F.cross_entropy(model(x), y))["0.weight"]
    errors = []
    for bits in (1, 2, 4):
        fns = [F.gelu, F.silu]
        found = oracle(model, fns, [table(fn, bits) for fn in fns], x, y)["0.weight"]
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]


def test_saved_bytes_are_those_of_packed_codes():
    """Odd sizes: 7 x 5 x 9 elements per activation; what autograd holds is what the report says, and the formula."""
    model = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 9), Written(), nn.Linear(9, 3))
    x, y = torch.randn(7, 5, 4), torch.randint(0, 3, (7, 5))
    known, count = [*model.parameters(), x, y], 7 * 5 * 9
    compiled = compiled_with(model, ["fewbit{bits=3}"], x, y)
    report = compiled.report().saved_bytes
    assert report == saved_bytes(lambda: compiled.loss(x, y), [*known, *constants(compiled)])
    # left: two inputs of linear layers, the loss's own, and the codes; the written-out GELU kept four tensors
    assert report == 2 * 4 * count + 2 * packed_size(count, 3) + 4 * 7 * 5 * 3 + 4


def constants(compiled) -> list[torch.Tensor]:
    return list(compiled.program().partition.graph.constants.values())


def test_views_batches_and_dtypes():
    """A transposed argument, another batch size without another capture, an empty batch, bfloat16."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(F.gelu(self.first(x).transpose(0, 1)).transpose(0, 1))

    model, (x, y) = Turned().double(), batch()
    found = table(F.gelu, 2)
    reference = copy.deepcopy(model)
    compiled = compiled_with(model, "fewbit{bits=2}", x, y, dynamic="auto")
    for n in (7, 5, 12):
        x, y = batch(n)
        grads = train_step(compiled, x, y)
        hidden = reference.first(x)
        out = reference.last(by_table(F.gelu, found)(hidden))
        assert_close(grads, eager_grads(reference, F.cross_entropy(out, y)), rtol=1e-9)
    assert compiled._captures == {"loss": 1}
    x, y = batch(0)
    grads = train_step(compiled, x, y)
    assert all(g.shape == p.shape for g, p in zip(grads.values(), model.parameters(), strict=True))
    half = copy.deepcopy(model).bfloat16()
    x, y = batch(9, torch.bfloat16)
    grads = train_step(compiled_with(half, "fewbit{bits=2}", x, y), x, y)
    hidden = half.first(x).detach()
    out = half.last(F.gelu(hidden))
    (g,) = torch.autograd.grad(F.cross_entropy(out, y), half.last.bias)
    assert torch.equal(grads["last.bias"], g)
    slope = torch.from_numpy(found.derivative(hidden.double().numpy())).bfloat16()
    through = (out.softmax(-1) - F.one_hot(y, 3)) / len(x)
    expected = ((through @ half.last.weight) * slope).T @ x
    assert (grads["first.weight"] - expected).norm() < 0.03 * expected.norm()


# --- what is taken, and why not ------------------------------------------------------------------------------------


def test_says_why_an_operator_was_not_taken():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = torch.tanh(self.a(x))  # the next layer keeps its result
            h = self.b(h)
            h = h * h * 0.1  # grows: no table
            return self.c(2.5 * h)

    model, (x, y) = Net().double(), batch()
    compiled = compiled_with(model, "fewbit", x, y)
    said = " | ".join(reasons(compiled, "fewbit"))
    assert "%linear_1 keeps %tanh" in said
    assert "unbounded" in said
    assert "found no operator" in said
    assert_close(train_step(compiled, x, y), eager_grads(model, F.cross_entropy(model(x), y)), rtol=1e-12)
    # asked for by name, it is an error that names the place
    squares = nn.Sequential(nn.Linear(4, 6), Act(lambda h: h**2), nn.Linear(6, 3)).double()
    with pytest.raises(gr.RuleError, match="unbounded") as caught:
        compiled_with(squares, {"1": "fewbit"}, x, y)
    assert "module 1" in str(caught.value)


def test_selects_modules():
    """In a map the first glob wins; text forms round-trip; a glob without a match is an error."""
    model, (x, y) = net(F.gelu, F.gelu, F.silu), batch()
    compiled = compiled_with(model, {"3": "none", "5": "fewbit{bits=1}", "*": "fewbit"}, x, y)
    other = copy.deepcopy(model)
    other[1], other[5] = Act(by_table(F.gelu, table(F.gelu, 3))), Act(by_table(F.silu, table(F.silu, 1)))
    assert_close(train_step(compiled, x, y), eager_grads(other, F.cross_entropy(other(x), y)), rtol=1e-9)
    with pytest.raises(gr.RuleError, match="matches no module"):
        compiled_with(model, 'fewbit{only=["nowhere"]}', x, y)
    built = textform.build("codec", 'fewbit{bits=2,weight=normal,skip=["a.*"]}')
    assert built == FewBit(bits=2, weight="normal", skip=("a.*",))
    assert textform.build("codec", str(built)) == built


@pytest.mark.parametrize("text", ["fewbit{bits=0}", "fewbit{bits=5}", "approx_bp{bits=7,constants=derived}"])
def test_refuses_bits_out_of_range(text):
    with pytest.raises(gr.RuleError, match="out of range"):
        compiled_with(net(F.gelu), text, *batch())


# --- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dfa", pytest.param("mono_forward", marks=SLOW)])
def test_with_other_rules(rule):
    """The same rule on a model with the table built in: same feedback, same heads, same gradients."""
    model, (x, y) = net(F.gelu, F.silu), batch()
    fns = [F.gelu, F.silu]
    compiled = compiled_with(model, "fewbit{bits=2,always=true}", x, y, rule, blocks="layers", seed=3)
    built_in = with_tables(model, fns, [table(fn, 2) for fn in fns])
    reference = compiled_with(built_in, None, x, y, rule, blocks="layers", seed=3)
    plain = compiled_with(copy.deepcopy(model), None, x, y, rule, blocks="layers", seed=3)
    found, wanted, exact = (train_step(c, x, y) for c in (compiled, reference, plain))
    assert_close(found, wanted, rtol=1e-9)
    assert (found["0.weight"] - exact["0.weight"]).norm() > 1e-3 * exact["0.weight"].norm()
    assert str(compiled.report().certificates) == str(plain.report().certificates)


# --- Approx-BP -----------------------------------------------------------------------------------------------------


def test_approx_bp_is_a_sum_of_relus():
    """The published derivative, from its formula: Σ a_i [x > c_i]."""
    model, (x, y) = net(F.gelu, F.silu, F.mish), batch(40)
    compiled = compiled_with(model, "approx_bp", x, y)
    with pytest.raises(gr.RuleError, match="constants are for 2 bits"):
        compiled_with(model, "approx_bp{bits=3}", x, y)
    with pytest.raises(gr.RuleError, match="knows no constants"):
        compiled_with(model, "approx_bp{constants=guessed}", x, y)
    assert any("no constants are published" in text for text in reasons(compiled, "approx_bp"))

    class Relus(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, fn, heights, knots):
            ctx.slope = sum(a * (x >= c).double() for a, c in zip(heights, knots, strict=True))
            return fn(x)

        @staticmethod
        def backward(ctx, g):
            return g * ctx.slope, None, None, None

    other = copy.deepcopy(model)
    aten = torch.ops.aten
    for place, fn, target in ((1, F.gelu, aten.gelu.default), (3, F.silu, aten.silu.default)):
        other[place] = Act(lambda x, fn=fn, target=target: Relus.apply(x, fn, *PUBLISHED[target]))
    assert_close(train_step(compiled, x, y), eager_grads(other, F.cross_entropy(other(x), y)), rtol=1e-9)


@SLOW
def test_approx_bp_derives_constants_for_any_activation():
    model, (x, y) = net(F.mish, Written()), batch(40)
    compiled = compiled_with(model, "approx_bp{constants=derived}", x, y)
    fns = [F.mish, written]
    tables = [table(fn, 2, objective="primitive", pinned=True) for fn in fns]
    assert_close(train_step(compiled, x, y), oracle(model, fns, tables, x, y), rtol=1e-6)
    assert tables[1].primitive_error == pytest.approx(published_table("gelu").primitive_error, rel=0.02)
