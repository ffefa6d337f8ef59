"""Direct feedback alignment against loops written from its formula, on every kind of model."""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import pytest
import torch
from graphrewrite.passes.rules import _feedback
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.analysis.cost import count
from graphrewrite.graph.nodes import Role, info
from graphrewrite.graph.ops import VjpCall, is_vjp
from graphrewrite.testing import zoo
from helpers import assert_close, assert_golden, cotangents_of_other_blocks, eager_grads, train_step

MODELS = ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "lstm")


def net(*widths: int, bias: bool = True, act: type[nn.Module] | None = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), *([act()] if act else [])]
    return nn.Sequential(*(layers[:-1] if act else layers)).double()


def compiled_dfa(model, x, y, rule="dfa", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return gr.compile(model, rule, example_inputs=x, example_targets=y, **options)


def feedback(compiled, name: str) -> torch.Tensor:
    return compiled.rule_state[f"dfa.feedback.{name}"]


def by_segments(segments, x, y, signals) -> dict[int, torch.Tensor]:
    """DFA on a chain of functions: each is differentiated alone, from its signal; the last one from the loss.

    Returns the gradient of every parameter, by `id`.
    """
    grads: dict[int, torch.Tensor] = {}
    outputs, h = [], x
    for segment in segments:
        h = segment(h.detach())
        outputs.append(h)
    loss = gr.default_loss(h, y)
    (error,) = torch.autograd.grad(loss, h, retain_graph=True)
    for i, (segment, out) in enumerate(zip(segments, outputs, strict=True)):
        parameters = [p for m in segment for p in m.parameters()]
        cotangent = error if i == len(segments) - 1 else signals[i](error, out)
        for p, g in zip(parameters, torch.autograd.grad(out, parameters, cotangent), strict=True):
            grads[id(p)] = grads.get(id(p), 0) + g
    return grads


class Segment(list):
    """Modules that are called in a row, after an optional function."""

    def __call__(self, h):
        for module in self:
            h = module(h)
        return h


def named(model, grads):
    return {n: grads[id(p)] for n, p in model.named_parameters()}


# --- against loops -------------------------------------------------------------------------------------------------


def test_mlp_by_hand():
    """The formula, without autograd: delta_l = (e B_l) * phi'(z_l), G_l = delta_l^T h_{l-1}."""
    model = net(4, 6, 5, 3)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    compiled = compiled_dfa(model, x, y, blocks="layers")
    grads = train_step(compiled, x, y)
    hidden, h = [x], x
    for linear in (model[0], model[2]):
        h = torch.tanh(h @ linear.weight.T + linear.bias)
        hidden.append(h)
    logits = h @ model[4].weight.T + model[4].bias
    error = (logits.softmax(-1) - F.one_hot(y, 3)) / 7
    expected = {"4.weight": error.T @ hidden[2], "4.bias": error.sum(0)}
    for name, below, out in (("0", hidden[0], hidden[1]), ("2", hidden[1], hidden[2])):
        delta = (error @ feedback(compiled, name)) * (1 - out**2)
        expected |= {f"{name}.weight": delta.T @ below, f"{name}.bias": delta.sum(0)}
    assert_close(grads, {n: g.detach() for n, g in expected.items()})


@pytest.mark.parametrize("spatial", ["dense", "tile"])
def test_conv_net_with_batch_norm(spatial):
    """Dense: own weights for every position of the map; tile: the same signal everywhere, one weight per channel."""
    convs = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()
    )
    model = nn.Sequential(convs, nn.Flatten(), nn.Linear(4 * 4 * 4, 3)).double()
    x, y = torch.randn(5, 2, 6, 6).double(), torch.randint(0, 3, (5,))
    compiled = compiled_dfa(model, x, y, f"dfa{{spatial={spatial}}}", blocks="layers")
    # the blocks: each convolution with its normalisation and activation; blocks="layers" makes the norms' own blocks
    names = [n.removeprefix("dfa.feedback.") for n in compiled.rule_state]
    assert names == ["0.0", "0.1", "0.3", "0.4"]

    def signal(name):
        weight = feedback(compiled, name)

        def project(error, out):
            if name == "0.4" or spatial == "dense":  # the last boundary is flat already
                return (error @ weight).reshape(out.shape)
            return (error @ weight)[:, :, None, None].expand(out.shape)

        return project

    segments = [
        Segment([convs[0]]),
        Segment([convs[1], convs[2]]),
        Segment([convs[3]]),
        Segment([convs[4], convs[5], model[1]]),
        Segment([model[2]]),
    ]
    shapes = {"dense": (3, 3 * 6 * 6), "tile": (3, 3)}
    assert feedback(compiled, "0.0").shape == shapes[spatial]
    grads = train_step(compiled, x, y)
    expected = by_segments(segments, x, y, [signal(n) for n in names])
    assert_close(grads, named(model, expected))


class Layer(nn.Module):
    def __init__(self, post: bool):
        super().__init__()
        self.post = post
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def attend(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))

    def first(self, x):
        return self.norm1(x + self.attend(x)) if self.post else x + self.attend(self.norm1(x))

    def widen(self, h):
        return F.gelu(self.up(h if self.post else self.norm2(h)))

    def last(self, h, a):
        return self.norm2(h + self.down(a)) if self.post else h + self.down(a)

    def forward(self, x):
        h = self.first(x)
        return self.last(h, self.widen(h))


class Transformer(nn.Module):
    def __init__(self, post: bool = False):
        super().__init__()
        self.token, self.layer, self.head = nn.Embedding(8, 6), Layer(post), nn.Linear(6, 5)

    def forward(self, tokens):
        return self.head(self.layer(self.token(tokens)))


BLOCKS = ["token", "layer", "head"]


def transformer(post: bool = False):
    return Transformer(post).double(), torch.randint(0, 8, (3, 4)), torch.randint(0, 5, (3, 4))


@pytest.mark.parametrize("per_sample", [False, True])
def test_transformer_macro(per_sample):
    """Errors per token reach each token; with `per_sample`, an error per sequence reaches all of its tokens."""
    model, x, y = transformer()
    options = {}
    if per_sample:
        options["loss"] = lambda out, target: F.cross_entropy(out.mean(1), target)
        y = y[:, 0]
    compiled = compiled_dfa(model, x, y, blocks=BLOCKS, **options)
    grads = train_step(compiled, x, y)
    token = model.token(x)
    h = model.layer(token.detach())
    logits = model.head(h.detach())
    loss = (options.get("loss") or gr.default_loss)(logits, y)
    (error,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert error.shape == (3, 4, 5)
    expected = {f"head.{n}": g for n, g in eager_grads(model.head, loss).items()}
    for name, out in (("token", token), ("layer", h)):
        signal = error @ feedback(compiled, name)
        parameters = dict(getattr(model, name).named_parameters(prefix=name))
        found = torch.autograd.grad(out, list(parameters.values()), signal)
        expected |= dict(zip(parameters, found, strict=True))
    assert_close(grads, expected)


def test_an_error_per_sequence_is_tiled_over_its_tokens():
    class Pooled(Transformer):
        def forward(self, tokens):
            return self.head(self.layer(self.token(tokens)).mean(1))

    model, x, y = Pooled().double(), torch.randint(0, 8, (3, 4)), torch.randint(0, 5, (3,))
    compiled = compiled_dfa(model, x, y, blocks=["token", "layer", "head"])
    grads = train_step(compiled, x, y)
    token = model.token(x)
    pooled = model.layer(token.detach()).mean(1)
    logits = model.head(pooled.detach())
    (error,) = torch.autograd.grad(gr.default_loss(logits, y), logits)
    signal = (error @ feedback(compiled, "token"))[:, None].expand(3, 4, 6)
    (expected,) = torch.autograd.grad(token, model.token.weight, signal)
    assert torch.allclose(grads["token.weight"], expected, rtol=1e-12)


@pytest.mark.parametrize("post", [False, True])
def test_transformer_micro(post):
    """Three points per layer: after attention (and its norm, if that comes last), in and after the feed-forward."""
    model, x, y = transformer(post)
    compiled = compiled_dfa(model, x, y, "dfa{placement=micro}", blocks=BLOCKS)
    names = [n.removeprefix("dfa.feedback.") for n in compiled.rule_state]
    assert names == ["token", "layer", "layer_inner0", "layer_inner1"]
    grads = train_step(compiled, x, y)
    layer, token = model.layer, model.token(x)
    h = layer.first(token.detach())
    below = h.detach()
    a = layer.widen(below)
    out = layer.last(below, a.detach())
    logits = model.head(out.detach())
    loss = gr.default_loss(logits, y)
    (error,) = torch.autograd.grad(loss, logits, retain_graph=True)
    signals = [error @ feedback(compiled, n) for n in names]
    expected = {f"head.{n}": g for n, g in eager_grads(model.head, loss).items()}
    for value, signal in zip((token, out, h, a), signals, strict=True):
        parameters = {n: p for n, p in model.named_parameters() if not n.startswith("head")}
        found = torch.autograd.grad(value, list(parameters.values()), signal, allow_unused=True)
        for name, grad in zip(parameters, found, strict=True):
            if grad is not None:
                expected[name] = expected.get(name, 0) + grad
    assert_close(grads, expected)


def test_nodes_of_a_graph_are_the_batch():
    case = zoo.make("gcn")
    case.model.double()
    (x, edges), y = case.batch(4)
    x = x.double()
    compiled = compiled_dfa(case.model, (x, edges), y)
    grads = train_step(compiled, (x, edges), y)
    convs = case.model.convs
    first = F.relu(convs[0](x, edges))
    second = F.relu(convs[1](first.detach(), edges))
    logits = convs[2](second.detach(), edges)
    loss = gr.default_loss(logits, y)
    (error,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = {f"convs.2.{n}": g for n, g in eager_grads(convs[2], loss).items()}
    for i, out in enumerate((first, second)):
        parameters = dict(convs[i].named_parameters(prefix=f"convs.{i}"))
        signal = error @ feedback(compiled, f"convs.{i}")
        expected |= dict(zip(parameters, torch.autograd.grad(out, list(parameters.values()), signal), strict=True))
    assert_close(grads, expected)


def test_linear_net_with_path_products_is_backpropagation():
    """Identity 5: B_l = W_L ... W_{l+1} gives the exact gradient, to round-off."""
    model = net(5, 7, 6, 8, 3, bias=False, act=None)
    x, y = torch.randn(9, 5).double(), torch.randint(0, 3, (9,))
    compiled = compiled_dfa(model, x, y)
    product = torch.eye(3).double()
    for i in (3, 2, 1):
        product = product @ model[i].weight.detach()
        feedback(compiled, str(i - 1)).copy_(product)
    expected = eager_grads(model, gr.default_loss(model(x), y))
    assert_close(train_step(compiled, x, y), expected, rtol=1e-14)
    for angle in compiled.alignment(x, y).values():
        assert angle.cosine == pytest.approx(1.0, abs=1e-12)
        assert angle.norm_ratio == pytest.approx(1.0, abs=1e-12)


# --- every model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_runs_on(name):
    """All parameters learn, no cotangent of another block is alive, and the last block has the exact gradient."""
    case = zoo.make(name)
    x, y = case.batch(4)
    compiled = compiled_dfa(case.model, x, y, loss=case.loss)
    alignment = compiled.alignment(x, y)
    assert set(alignment) == {n for n, p in case.model.named_parameters() if p.requires_grad}
    assert not cotangents_of_other_blocks(compiled.graph("operator"))
    proofs = compiled.report().certificates
    assert not any(b.backward_locked or b.weight_transport for b in proofs.blocks)
    assert proofs.global_error
    last = list(compiled.parameters_by_block())[-1]
    if name != "gpt2":  # its last block is a norm under the head that is tied to the embedding
        assert alignment.blocks[last].cosine == pytest.approx(1.0, abs=1e-4)


def test_golden_graph():
    model, x, y = transformer()
    compiled = compiled_dfa(model, x, y, "dfa{placement=micro,shared=true}", blocks=BLOCKS)
    assert_golden(compiled.graph("operator"), "transformer_dfa_micro")


def test_at_layers_an_mlp_has_no_cotangent_product_left_but_projections():
    model = net(4, 6, 6, 6, 3, act=nn.ReLU)
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    graph = compiled_dfa(model, x, y, blocks="layers").graph("operator")
    products = [n for n in graph.backward_nodes() if is_vjp(n) and "linear" in VjpCall.of(n).mirror.name]
    assert len(products) == 4
    assert all(info(n).role is Role.GRADIENT for n in products)
    cost = count(compiled_dfa(model, x, y, blocks="layers").graph("aten"))
    assert "cotangent" not in cost.by_role
    assert cost.by_role["signal"] == 3 * 2 * 8 * 3 * 6
    assert cost.by_role["gradient"] == cost.by_role["forward"]


# --- options -------------------------------------------------------------------------------------------------------


def test_shared_matrix_gives_its_first_columns():
    model = net(4, 6, 5, 3)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    shared = compiled_dfa(model, x, y, "dfa{shared=true}", blocks="layers")
    assert {n: tuple(w.shape) for n, w in shared.rule_state.items()} == {"dfa.feedback.shared": (3, 6)}
    own = compiled_dfa(model, x, y, blocks="layers")
    for name, width in (("0", 6), ("2", 5)):
        feedback(own, name).copy_(feedback(shared, "shared")[:, :width])
    assert_close(train_step(shared, x, y), train_step(own, x, y), rtol=1e-14)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_distributions_have_the_variance_of_the_formula(distribution):
    model = net(4, 400, 3)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    weight = feedback(compiled_dfa(model, x, y, f"dfa{{distribution={distribution},scale=2}}"), "0")
    assert weight.var().item() == pytest.approx(4 / 400 / 3, rel=0.1)
    bound = 2 / math.sqrt(400)
    assert (weight.abs().max() <= bound) == (distribution == "uniform")


def test_feedback_is_the_seeds():
    model = net(4, 6, 3)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    one, same, other = (feedback(compiled_dfa(model, x, y, seed=s), "0") for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_trains_through_an_outside_loss():
    model = net(4, 6, 5, 3)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    compiled = compiled_dfa(model, x, y, blocks="layers")
    expected = train_step(compiled, x, y)
    compiled.zero_grad()
    F.cross_entropy(compiled(x), y).backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected, rtol=1e-12)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_narrow_block_is_warned_about():
    model = net(4, 6, 2, 5)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 5, (7,))
    with pytest.warns(UserWarning, match=r"narrower than the output error, whose rank is up to 5: blocks 2 \(2\)"):
        compiled = gr.compile(model, "dfa", example_inputs=x, example_targets=y)
    assert any("narrower" in text for _, _, text in compiled.graph().log.entries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.compile(net(4, 6, 5, 5), "dfa", example_inputs=x, example_targets=y)


def test_feedback_that_does_not_fit_in_memory_is_refused():
    """A map of 2 x 8192 x 8192 times 60000 classes: 30000 GiB in float32."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 60000)
    )
    x, y = torch.zeros(1, 1, 1, 1).expand(2, 1, 8192, 8192), torch.zeros(2, dtype=torch.long)
    with pytest.raises(gr.RuleError, match=r"\(60000, 134217728\): 30000.0 GiB") as caught:
        gr.compile(model, "dfa{spatial=dense}", example_inputs=x, example_targets=y, blocks=["0", "1", "4"])
    assert "shared=true" in str(caught.value)
    assert "spatial=tile" in str(caught.value)


def test_the_shared_matrix_is_the_way_out(monkeypatch):
    """Five matrices of (10, 40) in float64 are 16 kB, the shared one is 3.2 kB."""
    monkeypatch.setattr(_feedback, "memory_of", lambda device: 8000)
    model = net(4, 40, 40, 40, 40, 40, 10)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 10, (7,))
    with pytest.raises(gr.RuleError, match="shared=true"):
        gr.compile(model, "dfa", example_inputs=x, example_targets=y)
    train_step(gr.compile(model, "dfa{shared=true}", example_inputs=x, example_targets=y), x, y)


def test_an_error_that_is_not_finite_reaches_every_block_as_under_backpropagation():
    model = net(4, 6, 5, 3)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    compiled = compiled_dfa(model, x, y)
    with torch.no_grad():
        model[4].bias[0] = math.inf
    loss = compiled.loss(x, y)
    assert loss.isnan()
    grads = train_step(compiled, x, y)
    exact = eager_grads(model, gr.default_loss(model(x), y))
    assert all(g.isnan().any() for g in exact.values())
    assert all(g.isnan().any() for g in grads.values())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("dfa{placement=nano}", "placement='nano' is unknown"),
        ("dfa{placement=micro}", "found no point between sublayers"),
        ("dfa{generated=true,shared=true}", "need not be shared"),
        ("dfa{generated=true,distribution=cauchy}", "distribution='cauchy' is unknown"),
    ],
)
def test_bad_options(rule, message):
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    with pytest.raises(gr.RuleError, match=message):
        gr.compile(net(4, 6, 5, 3), rule, example_inputs=x, example_targets=y, blocks="layers")


def test_a_single_block_is_refused():
    with pytest.raises(gr.RuleError, match="at least two blocks"):
        gr.compile(nn.Linear(4, 3), "dfa", example_inputs=torch.randn(7, 4), example_targets=torch.zeros(7).long())


class Outputs(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), kind

    def forward(self, x):
        h = torch.tanh(self.body(x))
        out = self.head(h)
        return {"tuple": (out, h), "dict": {"answer": out}, "integer": out.argmax(-1)}[self.kind]


def _read(key, outputs, targets):
    return F.cross_entropy(outputs[key], targets)


def test_outputs_that_are_no_tensor():
    """A tuple or dict works with a loss that reads it; the default loss says what it cannot read."""
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    for kind, key in (("tuple", 0), ("dict", "answer")):
        read = functools.partial(_read, key)
        model = Outputs(kind).double()
        with pytest.raises(gr.RuleError, match="loss="):
            gr.compile(model, "dfa", example_inputs=x, example_targets=y)
        grads = train_step(compiled_dfa(model, x, y, loss=read), x, y)
        assert set(grads) == {n for n, _ in model.named_parameters()}
    with pytest.raises(gr.RuleError, match="no output of the model has a cotangent"):
        compiled_dfa(Outputs("integer").double(), x, y, loss=lambda o, t: (o - t).double().mean())
