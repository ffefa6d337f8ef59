"""Tables of derivatives: against dynamic programs and searches written apart, and against published constants."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from graphrewrite.passes.compression import _samples, tables
from graphrewrite.passes.compression.approx_bp import published_table
from graphrewrite.passes.compression.tables import load_tables, save_tables, table
from torch.nn import functional as F

import graphrewrite as gr

FUNCTIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
}
BITS = (1, 2, 3, 4)
SLOW = pytest.mark.slow


def midpoints(count: int) -> tuple[np.ndarray, float]:
    step = 40.0 / count
    return -20.0 + step * (np.arange(count) + 0.5), step


def on_grid(name: str, weight: str, count: int = 40_000) -> tuple[np.ndarray, ...]:
    """x, f, f' and quadrature weights by the midpoint rule: none of it shared with the implementation."""
    x, step = midpoints(count)
    leaf = torch.tensor(x, requires_grad=True)
    value = FUNCTIONS[name](leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    mass = np.full_like(x, step) if weight == "uniform" else step * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    return x, value.detach().numpy(), slope.numpy(), mass


def best_of_runs(slope: np.ndarray, mass: np.ndarray, groups: np.ndarray, pieces: int) -> list[float]:
    """The least ∫ (f' - q)² w for 1 .. pieces levels, each on a run of neighbouring groups: O(n² k), no cleverness."""
    count = int(groups.max()) + 1
    sums = [np.bincount(groups, mass * slope**p, count) for p in (0, 1, 2)]
    m, s, q = (np.concatenate([[0], np.cumsum(part)]) for part in sums)
    begin, end = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
    weight = np.where(end > begin, m[end] - m[begin], 1)
    cost = q[end] - q[begin] - (s[end] - s[begin]) ** 2 / np.where(weight > 0, weight, 1)
    cost = np.where(end > begin, cost, np.inf)
    best = [cost[0]]
    for _ in range(1, pieces):
        best.append((best[-1][:, None] + cost).min(0))
    return [float(row[-1]) for row in best]


def check_optimal(name: str, weight: str) -> None:
    x, value, slope, mass = on_grid(name, weight)
    by_place = best_of_runs(slope, mass, np.arange(len(x)) // 50, 16)
    order = np.argsort(slope, kind="stable")
    # 600 groups of values: half of even width, half of even mass times slope
    rank = np.cumsum(np.sqrt(np.abs(np.gradient(slope[order])) * mass[order]) + 1e-9)
    groups = np.minimum((rank / rank[-1] * 600).astype(int), 599)
    by_value = best_of_runs(slope[order], mass[order], np.unique(groups, return_inverse=True)[1], 16)
    for bits in BITS:
        found = table(FUNCTIONS[name], bits, weight=weight)
        assert 0 < found.bound <= found.error * (1 + 1e-9)
        assert found.error <= 1.001 * found.bound, (name, weight, bits, found.error / found.bound)
        # what it says of itself
        ours = found.derivative(x)
        error = (mass * (slope - ours) ** 2).sum()
        assert error == pytest.approx(found.error, rel=2e-3)
        knots = np.array([-20.0, *found.borders, 20.0])
        slopes = np.array([found.levels[code] for code in found.codes])
        drift = value - np.interp(x, knots, np.concatenate([[0.0], np.cumsum(slopes * np.diff(knots))]))
        drift -= (mass * drift).sum() / mass.sum()
        assert (mass * drift**2).sum() == pytest.approx(found.primitive_error, rel=1e-2, abs=1e-6)
        # against programs that only know the same problem
        assert found.error <= 1.001 * by_place[2**bits - 1]
        assert found.error <= 1.001 * by_value[2**bits - 1]
        assert found.error >= 0.99 * by_value[2**bits - 1]
        assert len(set(found.codes)) <= 2**bits == len(found.levels)


QUICK = ("gelu", "silu", "tanh", "selu", "hardswish")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=SLOW) for n in FUNCTIONS])
def test_uniform_tables_are_optimal(name):
    check_optimal(name, "uniform")


@pytest.mark.parametrize("name", [n if n in ("gelu", "softsign") else pytest.param(n, marks=SLOW) for n in FUNCTIONS])
def test_normal_tables_are_optimal(name):
    check_optimal(name, "normal")


@pytest.mark.parametrize("name", [n if n == "gelu" else pytest.param(n, marks=SLOW) for n in FUNCTIONS])
def test_contiguous_tables_are_the_optimum_of_their_own_problem(name):
    x, _, slope, mass = on_grid(name, "uniform")
    coarse = best_of_runs(slope, mass, np.arange(len(x)) // 50, 8)
    for bits in (1, 2, 3):
        found = table(FUNCTIONS[name], bits, contiguous=True)
        assert found.codes == tuple(range(2**bits))
        assert found.error <= 1.001 * coarse[2**bits - 1]
        assert found.error <= 1.004 * found.bound
        assert table(FUNCTIONS[name], bits).error <= found.error * (1 + 1e-6)


def test_known_optima():
    """Published in digits: the dynamic program on [-20, 20], four decimals."""
    known = {
        ("gelu", 2): ((-0.4602, 0, 0.4602), (-0.0076, 0.3227, 0.6773, 1.0076)),
        ("gelu", 3): (
            (-2.4089, -0.7105, -0.3261, 0, 0.3261, 0.7105, 2.4089),
            (-0.0011, -0.0885, 0.1255, 0.3722, 0.6278, 0.8745, 1.0885, 1.0011),
        ),
        ("silu", 2): ((-0.7623, 0, 0.7623), (-0.0126, 0.3181, 0.6819, 1.0126)),
        ("silu", 3): (
            (-4.6361, -1.1328, -0.5104, 0, 0.5104, 1.1328, 4.6361),
            (-0.0029, -0.0661, 0.1358, 0.3751, 0.6249, 0.8642, 1.0661, 1.0029),
        ),
    }
    for (name, bits), (borders, levels) in known.items():
        found = table(FUNCTIONS[name], bits, contiguous=True)
        np.testing.assert_allclose(found.borders, borders, atol=3e-4)
        np.testing.assert_allclose(found.levels, levels, atol=2e-4)


def test_better_than_published_tables():
    """FewBit's 3-bit GELU is the optimum where a level serves one interval; levels that serve several are better."""
    borders = np.array([-2.398, -0.711, -0.326, -0.0002, 0.326, 0.711, 2.398])
    levels = np.array([-0.0026, -0.0888, 0.1252, 0.3720, 0.6278, 0.8747, 1.0888, 1.0026])
    x, _, slope, mass = on_grid("gelu", "uniform")
    published = (mass * (slope - levels[np.searchsorted(borders, x)]) ** 2).sum()
    assert published == pytest.approx(table(F.gelu, 3, contiguous=True).error, rel=0.01)
    assert table(F.gelu, 3).error < 0.7 * published
    # ReGELU2 and ReSiLU2 are worse than that in the derivative norm by factors
    assert published_table("gelu").error == pytest.approx(0.1568, abs=5e-5)
    assert published_table("silu").error == pytest.approx(0.2375, abs=5e-5)
    assert table(F.gelu, 2).error <= 0.0431
    assert table(F.silu, 2).error <= 0.0546


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_derived_constants_are_the_published_ones(name):
    """Our optimiser finds ReGELU2 and ReSiLU2: the same error, the same function within the flatness of the optimum."""
    published, derived = published_table(name), table(FUNCTIONS[name], 2, objective="primitive", pinned=True)
    free = table(FUNCTIONS[name], 2, objective="primitive")
    assert published.primitive_error == pytest.approx({"gelu": 0.0095, "silu": 0.0399}[name], abs=5e-5)
    assert derived.primitive_error <= 1.001 * published.primitive_error
    assert free.primitive_error <= published.primitive_error
    assert free.bound <= free.primitive_error
    np.testing.assert_allclose(derived.borders, published.borders, atol=0.03)
    np.testing.assert_allclose(derived.levels, published.levels, atol=2e-3)
    assert derived.levels[0] == pytest.approx(0, abs=1e-6)
    assert derived.levels[-1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["gelu", "softplus", *(pytest.param(n, marks=SLOW) for n in ("selu", "tanh", "silu"))])
@pytest.mark.parametrize("weight", ["uniform", "normal"])
def test_primitive_tables_are_least_squares(name, weight):
    """No knots nearby are better, each fitted by a plain least-squares solver over hat functions."""
    x, value, _, mass = on_grid(name, weight, 8_000)
    root = np.sqrt(mass)

    def left_over(knots: np.ndarray) -> float:
        at = np.concatenate([[-20.0], knots, [20.0]])
        hats = np.stack([np.interp(x, at, row) for row in np.eye(len(at))], 1) * root[:, None]
        solved = np.linalg.lstsq(hats, value * root, rcond=None)[0]
        return float(((value * root - hats @ solved) ** 2).sum())

    rng = np.random.default_rng(0)
    for bits in (2, 3):
        found = table(FUNCTIONS[name], bits, weight=weight, objective="primitive")
        knots = np.array(found.borders)
        mine = left_over(knots)
        # in the implementation the constant of integration is free and the values are those of the slopes
        assert found.primitive_error == pytest.approx(mine, rel=0.02, abs=1e-9)
        assert found.bound <= found.primitive_error
        width = np.diff(np.concatenate([[-20.0], knots, [20.0]])).min()
        others = [left_over(np.sort(knots + size * width * rng.normal(size=len(knots)))) for size in (0.2, 0.05) * 6]
        assert min(others) > mine * 0.999


def test_piecewise_linear_functions_are_exact():
    found = table(F.relu, 1)
    assert (found.borders, found.error) == ((0.0,), pytest.approx(0, abs=1e-12))
    np.testing.assert_allclose(found.levels, (0, 1))
    found = table(F.hardtanh, 1)
    np.testing.assert_allclose(found.borders, (-1, 1), atol=1e-6)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert table(lambda x: 3 * x, 4).borders == ()


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda x: x**2, "unbounded: it keeps growing"),
        (lambda x: x.abs().sqrt(), "unbounded near 0"),
        (lambda x: (x - 1 / 3).sign() * (x - 1 / 3).abs() ** 0.6, "unbounded near 0.333"),
        (torch.exp, "unbounded"),
        (torch.sin, "still changes outside"),
        (lambda x: x.sum(), "no differentiable function of one number"),
        (lambda x: x.detach(), "no differentiable function"),
    ],
)
def test_refuses_functions_without_a_table(fn, text):
    with pytest.raises(gr.RuleError, match=text):
        table(fn, 2)


def test_refuses_options_out_of_range():
    for bits in (0, 5, True, 2.0):
        with pytest.raises(gr.RuleError, match="out of range"):
            table(F.gelu, bits)
    with pytest.raises(gr.RuleError, match="no table with weight"):
        table(F.gelu, 2, weight="cauchy")


def test_tables_travel_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_TABLES", {})
    made = table(F.gelu, 2, key="gelu")
    table(F.gelu, 1)  # without a key it stays in the process
    assert save_tables(tmp_path / "tables.json") == 1
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr(_samples.Samples, "of", None)  # nothing is computed any more
    assert load_tables(tmp_path / "tables.json") == 1
    assert table(F.gelu, 2, key="gelu") == made
    for text in ("no json", json.dumps([1]), json.dumps([[["gelu"], {"bits": 2}]])):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(gr.RuleError, match="holds no tables"):
            load_tables(tmp_path / "bad.json")
