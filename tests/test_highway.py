"""Highway-BP against its recursion written with Jacobian-vector products, and against backpropagation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import call
from helpers import assert_close, assert_golden, eager_grads, train_step

MODELS = ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "lstm")


class Block(nn.Module):
    """f(x) = r(x, g(x)) with the residual of the wanted kind."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.gate = nn.Linear(4, 4)

    def branch(self, x):
        return self.down(torch.tanh(self.up(self.norm(x) if self.kind == "pre" else x)))

    def forward(self, x):
        z = self.branch(x)
        if self.kind == "relu":
            return F.relu(x + z)
        if self.kind == "post":
            return self.norm(x + z)
        if self.kind == "gated":
            return torch.sigmoid(self.gate(x)) * x + z
        return z if self.kind == "none" else x + z

    def skip(self, x, w, gamma):
        """K^T w: the derivative through the residual path alone."""
        z = self.branch(x)
        if self.kind == "relu":
            w = w * (x + z > 0)
        elif self.kind == "post":
            w = w * self.norm.weight / ((x + z).var(-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
        elif self.kind == "gated":
            w = w * torch.sigmoid(self.gate(x))
        elif self.kind == "none":
            return torch.zeros_like(w)
        return (1 - gamma) * w


class Net(nn.Module):
    def __init__(self, kind: str, depth: int = 4):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block(kind) for _ in range(depth)])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def case(kind: str, depth: int = 4):
    model = Net(kind, depth).double()
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1.0)
    return model, torch.randn(5, 3).double(), torch.randint(0, 3, (5,))


def compile_highway(model, x, y, rule, **options):
    return gr.compile(model, rule, example_inputs=x, example_targets=y, blocks=["stem", "blocks.*", "head"], **options)


def by_recursion(model, x, y, k, gamma=0.0) -> dict[str, torch.Tensor]:
    """The recursion of the paper: w_i^{k+1} = w_i^0 + u_i, u_i = w_{i+1}^k J_{i+1} + u_{i+1} K_{i+1}.

    J is the full derivative of a block minus K. Gradients of block i are those of its own, from w_i.
    """
    h = [model.stem(x)]
    for block in model.blocks:
        h.append(block(h[-1]))
    loss = F.cross_entropy(model.head(h[-1]), y)
    depth = len(model.blocks)
    below = [v.detach() for v in h]

    def full(i, w):
        start = below[i].clone().requires_grad_()
        return torch.autograd.grad(model.blocks[i](start), start, w)[0]

    def skip(i, w):
        return model.blocks[i].skip(below[i], w, gamma).detach()

    first = [torch.zeros_like(h[0])] * depth + [torch.autograd.grad(loss, h[-1], retain_graph=True)[0]]
    for i in reversed(range(depth)):
        first[i] = skip(i, first[i + 1])
    w = list(first)
    for _ in range(k):
        u = [torch.zeros_like(h[0])] * (depth + 1)
        for i in reversed(range(depth)):
            u[i] = full(i, w[i + 1]) - skip(i, w[i + 1]) + skip(i, u[i + 1])
        w = [a + b for a, b in zip(first, u, strict=True)]
    grads = {f"head.{n}": g for n, g in eager_grads(model.head, loss).items()}
    pieces = [("stem", model.stem, x, w[0])]
    pieces += [(f"blocks.{i}", b, below[i], w[i + 1]) for i, b in enumerate(model.blocks)]
    for prefix, module, start, signal in pieces:
        named = dict(module.named_parameters(prefix=prefix))
        found = torch.autograd.grad(module(start), list(named.values()), signal, allow_unused=True)
        grads |= {n: g for n, g in zip(named, found, strict=True) if g is not None}
    return grads


@pytest.mark.parametrize(
    ("kind", "k", "gamma"),
    [
        ("plain", 0, 0.0),
        ("plain", 1, 0.0),
        ("plain", 2, 0.3),
        pytest.param("relu", 0, 0.0, marks=pytest.mark.slow),
        ("relu", 2, 0.0),
        ("pre", 1, 0.2),
        pytest.param("post", 0, 0.0, marks=pytest.mark.slow),
        ("post", 2, 0.8),
        pytest.param("gated", 0, 0.0, marks=pytest.mark.slow),
        ("gated", 2, 0.0),
        ("none", 4, 0.0),
    ],
)
def test_recursion(kind, k, gamma):
    """Fewer iterations than blocks: the iterates themselves, for every kind of residual."""
    model, x, y = case(kind)
    grads = train_step(compile_highway(model, x, y, f"highway{{k={k},gamma={gamma}}}"), x, y)
    assert_close(grads, by_recursion(model, x, y, k, gamma), rtol=1e-12)
    if kind != "none":
        exact = eager_grads(model, F.cross_entropy(model(x), y))
        assert any((grads[n] - exact[n]).abs().max() > 1e-6 for n in exact)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_cosine_rises_to_one(kind):
    """Identity 6: the iterates approach backpropagation and reach it at the number of blocks."""
    model, x, y = case(kind)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    cosines = []
    for k in (0, 2, 4):
        grads = by_recursion(model, x, y, k) if k < 4 else train_step(compile_highway(model, x, y, "highway"), x, y)
        a, b = (torch.cat([g[n].flatten() for n in exact]) for g in (grads, exact))
        cosines.append(float(a @ b / a.norm() / b.norm()))
    assert cosines[0] < cosines[1] < cosines[2]
    assert_close(grads, exact, rtol=1e-13)


def test_more_iterations_than_blocks_add_nothing():
    model, x, y = case("plain", 2)
    one, two = (str(compile_highway(model, x, y, f"highway{{k={k}}}").graph("operator")) for k in (2, 50))
    assert one.partition("\n")[2] == two.partition("\n")[2]


@pytest.mark.parametrize("name", MODELS)
def test_as_many_iterations_as_blocks_are_backpropagation(name):
    made = zoo.make(name)
    made.model.double()
    for module in made.model.modules():  # same draws in both runs are another test's business
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(made.model, "config"):
        for layer in made.model.modules():
            if hasattr(layer, "dropout_prob"):
                layer.dropout_prob = 0.0
    x, y = made.batch(3)
    as_double = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
    x = torch.utils._pytree.tree_map(as_double, x)
    compiled = gr.compile(made.model, "highway{k=8}", example_inputs=x, example_targets=y, loss=made.loss)
    torch.manual_seed(1)
    grads = train_step(compiled, x, y)
    torch.manual_seed(1)
    exact = eager_grads(made.model, (made.loss or gr.default_loss)(call(made.model, x), y))
    assert_close(grads, exact, rtol=1e-10)


def test_learned_shortcuts_belong_to_the_skip():
    """A residual net with two stages: the shortcut of the second one keeps the way open at k=0."""
    made = zoo.make("resnet")
    x, y = made.batch(3)
    compiled = gr.compile(made.model, "highway{k=0}", example_inputs=x, example_targets=y)
    assert all(a.cosine > 0 for a in compiled.alignment(x, y).blocks.values())
    assert not any("no residual path" in text for _, _, text in compiled.graph().log.entries)


# --- certificate ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_branches_do_not_wait_for_each_other():
    """Backpropagation needs the blocks one after another, highway as many as there are iterations."""
    model, x, y = case("plain", 6)
    depth = {}
    for rule in ("bp", "dfa", "highway{k=0}", "highway{k=2}", "highway{k=6}"):
        depth[rule] = compile_highway(model, x, y, rule).report().certificates.backward_depth
    assert depth == {"bp": 8, "dfa": 1, "highway{k=0}": 2, "highway{k=2}": 4, "highway{k=6}": 8}


def test_golden_graph():
    model, x, y = case("relu", 2)
    compiled = compile_highway(model, x, y, "highway{k=1}")
    assert_golden(compiled.graph("operator"), "residual_highway")


# --- maps of rules, bad input --------------------------------------------------------------------------------------


def test_blocks_of_another_rule_are_differentiated_exactly():
    """The upper half learns by backpropagation: what comes out of it is exact."""
    model, x, y = case("plain")
    rule = {"blocks.2": "bp", "blocks.3": "bp", "*": "highway{k=2}"}
    grads = train_step(compile_highway(model, x, y, rule), x, y)
    assert_close(grads, eager_grads(model, F.cross_entropy(model(x), y)), rtol=1e-12)
    rough = train_step(compile_highway(model, x, y, {**rule, "*": "highway{k=0}"}), x, y)
    assert_close({"w": rough["blocks.1.up.weight"]}, {"w": grads["blocks.1.up.weight"]}, rtol=1e-12)
    assert (rough["stem.weight"] - grads["stem.weight"]).abs().max() > 1e-6


def test_too_few_iterations_for_a_net_without_skips():
    model, x, y = case("none")
    with pytest.raises(gr.RuleError, match=r"with k=1 no signal reaches blocks stem, blocks\.0, blocks\.1") as caught:
        compile_highway(model, x, y, "highway{k=1}")
    assert "k=4" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "blocks", "message"),
    [
        ("highway{k=-1}", "auto", "k >= 0"),
        ("highway{gamma=2}", "auto", "gamma in"),
        ("highway", ["blocks"], "at least two blocks"),
    ],
)
def test_bad_input(rule, blocks, message):
    model, x, y = case("plain", 1)
    whole = nn.Sequential(nn.Linear(3, 3)).double() if blocks != "auto" else model
    with pytest.raises(gr.RuleError, match=message):
        gr.compile(whole, rule, example_inputs=x, example_targets=y, blocks="auto")
