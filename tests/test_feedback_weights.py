"""Rules that read other weights in the place of the forward weights: fa usf brsf frsf kp pfa weight_mirror."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphrewrite as gr
from graphrewrite import random
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import call
from helpers import assert_close, eager_grads

RULES = ("fa", "usf", "brsf", "frsf", "kp", "pfa", "weight_mirror")
MATRIX = ("mlp", "cnn", "resnet", "gpt2", "bert", "vit", "gcn", "gat", "lstm")
QUICK = ("mlp",)
"""What is compiled in a second or two; the others run with -m slow."""


def matrix(names=MATRIX):
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in names]


def double(tree):
    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


def case_of(name: str, n: int = 3):
    case = zoo.make(name)
    torch.manual_seed(1)
    x, y = case.batch(n)
    return case.model.double(), double(x), y


def rule_grads(compiled, x, y, seed: int = 0):
    torch.manual_seed(seed)
    compiled.zero_grad()
    compiled.loss(x, y).backward()
    return {n: p.grad.clone() for n, p in compiled.module.named_parameters() if p.grad is not None}


def bp_grads(model, x, y, seed: int = 0):
    torch.manual_seed(seed)
    return eager_grads(model, gr.default_loss(call(model, x), y))


def feedback_of(compiled, kind: str = "feedback"):
    """Feedback weights by the name of the parameter they stand for."""
    found = {}
    for name, held in compiled.rule_state.items():
        rule, part, parameter = name.split(".", 2)
        assert rule in RULES
        if part == kind:
            found[parameter] = held
    return found


# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", matrix())
def test_fa_with_the_forward_weights_is_backpropagation(name):
    model, x, y = case_of(name)
    compiled = gr.compile(copy.deepcopy(model), "fa", example_inputs=x, example_targets=y, blocks="auto")
    parameters = dict(compiled.module.named_parameters())
    feedback = feedback_of(compiled)
    assert feedback
    before = rule_grads(compiled, x, y)
    expected = bp_grads(model, x, y)
    assert any((before[n] - expected[n]).abs().max() > 1e-3 * expected[n].abs().max() for n in expected)
    with torch.no_grad():
        for parameter, held in feedback.items():
            held.copy_(parameters[parameter])
    assert_close(rule_grads(compiled, x, y), expected)
    certificates = compiled.report().certificates
    assert not certificates.weight_transport, certificates


SCHEMES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3), 1 - 0.1 * 0.3),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5), 1 - 0.01 * 0.5),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), 1.0),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", matrix(["mlp", "cnn"]))
def test_kolen_pollack_difference_decays(name, scheme):
    """B_t - W_t = lambda^t (B_0 - W_0), on any data (identity 3)."""
    model, x, y = case_of(name)
    compiled = gr.compile(model, "kp", example_inputs=x, example_targets=y, blocks="layers")
    make, decay = SCHEMES[scheme]
    optimizer = make(compiled.parameters())
    parameters, feedback = dict(model.named_parameters()), feedback_of(compiled)
    start = {n: (held - parameters[n]).detach().clone() for n, held in feedback.items()}
    assert start
    torch.manual_seed(3)
    steps = 5
    for _ in range(steps):
        before = {n: parameters[n].detach().clone() for n in start}
        optimizer.zero_grad()
        compiled.loss(x + torch.randn_like(x), y).backward()
        optimizer.step()
        assert all((parameters[n] - before[n]).abs().max() > 1e-6 for n in start)
    assert_close({n: feedback[n] - parameters[n] for n in start}, {n: decay**steps * d for n, d in start.items()})


def test_kolen_pollack_with_coupled_decay_in_adam_breaks_the_identity():
    """What the rule's documentation says of Adam's own weight decay."""
    model, x, y = case_of("mlp")
    compiled = gr.compile(model, "kp", example_inputs=x, example_targets=y)
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.01, weight_decay=0.5)
    parameters, feedback = dict(model.named_parameters()), feedback_of(compiled)
    start = {n: (held - parameters[n]).detach().clone() for n, held in feedback.items()}
    for _ in range(3):
        optimizer.zero_grad()
        compiled.loss(x, y).backward()
        optimizer.step()
    for name, before in start.items():
        now = feedback[name] - parameters[name]
        assert (now - before * (now.norm() / before.norm())).norm() > 1e-3 * before.norm()


def test_gradients_of_w_and_b_do_not_share_memory():
    """Clipping or accumulating one must not change the other."""
    model, x, y = case_of("mlp")
    compiled = gr.compile(model, "kp", example_inputs=x, example_targets=y)
    for _ in range(2):
        compiled.loss(x, y).backward()
    feedback, parameters = feedback_of(compiled), dict(model.named_parameters())
    for name, held in feedback.items():
        assert torch.equal(held.grad, parameters[name].grad)
        assert held.grad.data_ptr() != parameters[name].grad.data_ptr()


@pytest.mark.parametrize("options", ["expand=3", "expand=1,orthogonal=true", "expand=4,density=0.5"])
def test_product_feedback_difference_decays(options):
    """R_t - B^T W_t = lambda^t (R_0 - B^T W_0) (identity 4), on a linear layer and on a convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 5)).double()
    x, y = torch.randn(3, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 1])
    compiled = gr.compile(model, f"pfa{{{options}}}", example_inputs=x, example_targets=y)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, weight_decay=0.4)
    parameters, fixed, path = dict(model.named_parameters()), feedback_of(compiled), feedback_of(compiled, "path")
    assert set(fixed) == set(path) == {"2.weight", "4.weight"}

    def difference(name):
        return (path[name].flatten(1) - fixed[name].t() @ parameters[name].flatten(1)).detach()

    start = {n: difference(n) for n in path}
    for _ in range(4):
        optimizer.zero_grad()
        compiled.loss(x + torch.randn_like(x), y).backward()
        optimizer.step()
    assert_close({n: difference(n) for n in path}, {n: 0.96**4 * d for n, d in start.items()})


def test_product_feedback_first_decay():
    """In its first steps `decay` acts on W and R as an optimizer's weight decay does, then no more."""
    model, x, y = case_of("mlp")
    plain = gr.compile(copy.deepcopy(model), "pfa", example_inputs=x, example_targets=y)
    decayed = gr.compile(model, "pfa{decay=0.7,decay_steps=2}", example_inputs=x, example_targets=y)
    own, path = dict(model.named_parameters()), feedback_of(decayed, "path")
    for step in range(4):
        left, right = rule_grads(plain, x, y), rule_grads(decayed, x, y)
        for name in left:
            extra = 0.7 * own[name] if name in path and step < 2 else 0.0
            torch.testing.assert_close(right[name], left[name] + extra)
        for name, held in path.items():
            expected = feedback_of(plain, "path")[name].grad + (0.7 * held if step < 2 else 0.0)
            torch.testing.assert_close(held.grad, expected)


def test_orthogonal_product_feedback_becomes_backpropagation():
    """With R = B^T W and B B^T = 1 the product is W."""
    model, x, y = case_of("cnn")
    compiled = gr.compile(model, "pfa{expand=2,orthogonal=true}", example_inputs=x, example_targets=y)
    own, fixed, path = dict(model.named_parameters()), feedback_of(compiled), feedback_of(compiled, "path")
    with torch.no_grad():
        for name, held in path.items():
            assert torch.allclose(fixed[name] @ fixed[name].t(), torch.eye(len(fixed[name]), dtype=torch.float64))
            held.copy_((fixed[name].t() @ own[name].flatten(1)).reshape(held.shape))
    assert_close(rule_grads(compiled, x, y), bp_grads(copy.deepcopy(model), x, y))


# --- independent loops ---------------------------------------------------------------------------------------------


class OtherWeight(torch.autograd.Function):
    """A product whose input gradient is taken at another weight: written by hand, nothing of the package in it."""

    @staticmethod
    def forward(ctx, x, weight, feedback, apply):
        ctx.save_for_backward(x, weight, feedback)
        ctx.product = apply
        return apply(x, weight)

    @staticmethod
    def backward(ctx, cotangent):
        x, weight, feedback = ctx.saved_tensors
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            (gw,) = torch.autograd.grad(ctx.product(x.detach(), leaf), leaf, cotangent)
            leaf = x.detach().requires_grad_()
            (gx,) = torch.autograd.grad(ctx.product(leaf, feedback.detach()), leaf, cotangent)
        return gx, gw, None, None


def other_linear(x, weight, bias, feedback):
    return OtherWeight.apply(x, weight, feedback, F.linear) + bias


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    def by_hand(self, x, feedback):
        h = torch.tanh(self.a(x))
        for name, layer in (("b", self.b), ("c", self.c)):
            h = other_linear(h, layer.weight, layer.bias, feedback[f"{name}.weight"])
            h = torch.tanh(h) if name == "b" else h
        return h


class ConvNet(nn.Module):
    """Batch-norm, a strided, a grouped dilated and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.c = nn.Conv2d(6, 4, 2, dilation=2, groups=2)
        self.d = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.e = nn.Linear(3, 4)

    def forward(self, x):
        h = torch.relu(self.norm(self.a(x)))
        h = torch.relu(self.d(torch.relu(self.c(torch.relu(self.b(h))))))
        return self.e(h.mean((2, 3)))

    def by_hand(self, x, feedback):
        h = torch.relu(self.norm(self.a(x)))
        calls = {
            "b": lambda h, w: F.conv2d(h, w, None, 2, 1),
            "c": lambda h, w: F.conv2d(h, w, None, 1, 0, 2, 2),
            "d": lambda h, w: F.conv_transpose2d(h, w, None, 2),
        }
        for name, apply in calls.items():
            layer = getattr(self, name)
            out = OtherWeight.apply(h, layer.weight, feedback[f"{name}.weight"], apply)
            h = torch.relu(out + layer.bias[:, None, None])
        return other_linear(h.mean((2, 3)), self.e.weight, self.e.bias, feedback["e.weight"])


class Transformer(nn.Module):
    """One layer around `nn.MultiheadAttention`: a packed projection weight, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(7, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, tokens):
        h = self.token(tokens)
        n = self.norm1(h)
        h = h + self.attention(n, n, n, need_weights=False)[0]
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return F.linear(h, self.token.weight)

    def by_hand(self, tokens, feedback):
        h = self.token(tokens)
        n, b, t = self.norm1(h), tokens.shape[0], tokens.shape[1]
        attention, packed = self.attention, feedback["attention.in_proj_weight"]
        q, k, v = (
            other_linear(n, w, bias, fb).view(b, t, 2, 4).transpose(1, 2)
            for w, bias, fb in zip(
                attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), packed.chunk(3), strict=True
            )
        )
        mixed = ((q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v).transpose(1, 2).reshape(b, t, 8)
        out = attention.out_proj
        h = h + other_linear(mixed, out.weight, out.bias, feedback["attention.out_proj.weight"])
        m = F.gelu(other_linear(self.norm2(h), self.up.weight, self.up.bias, feedback["up.weight"]))
        h = h + other_linear(m, self.down.weight, self.down.bias, feedback["down.weight"])
        return OtherWeight.apply(h, self.token.weight, feedback["token.weight"], F.linear)


NETS = {
    "mlp": (Mlp, lambda: (torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 4, (5,)))),
    "bn-cnn": (ConvNet, lambda: (torch.randn(3, 2, 9, 9, dtype=torch.float64), torch.randint(0, 4, (3,)))),
    "transformer": (Transformer, lambda: (torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (2, 5)))),
}


def fans(name, weight):
    """(in, out) of a weight, by torch's own convention; transposed convolutions count the other way round."""
    inputs, outputs = nn.init._calculate_fan_in_and_fan_out(weight)
    return (outputs, inputs) if name == "d.weight" and weight.dim() == 4 else (inputs, outputs)


def expected_feedback(rule, name, weight, compiled, step):
    """Each rule's feedback weight from its formula and from its own state."""
    weight = weight.detach()
    inputs, outputs = fans(name, weight)
    std = (2.0 / (inputs + outputs)) ** 0.5
    if rule == "usf":
        return std * weight.sign()
    if rule == "frsf":
        return feedback_of(compiled, "magnitude")[name] * weight.sign()
    if rule == "brsf":
        order = list(compiled.graph("operator").parameters())
        read = [n for n in order if n in step["read"]]
        counter = torch.tensor([0, step["number"], 0])
        size = random.uniform(counter, 1 + step["read"].index(name), weight.shape, weight.dtype) * 3**0.5 * std
        assert read
        return size * weight.sign()
    if rule == "pfa":
        b, r = feedback_of(compiled)[name].detach(), feedback_of(compiled, "path")[name].detach()
        if name == "c.weight" and weight.dim() == 4:  # two groups
            return torch.cat([bg @ rg.flatten(1) for bg, rg in zip(b.chunk(2), r.chunk(2), strict=True)]).view_as(
                weight
            )
        if name == "d.weight" and weight.dim() == 4:
            return torch.einsum("ok,ikxy->ioxy", b, r)
        return (b @ r.flatten(1)).view_as(weight)
    return feedback_of(compiled)[name].detach()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", matrix(NETS))
def test_against_a_loop_written_by_hand(rule, net):
    """Two steps of SGD, every gradient compared in each."""
    torch.manual_seed(0)
    make, batch = NETS[net]
    model = make().double()
    by_hand = copy.deepcopy(model)
    x, y = batch()
    spec = "weight_mirror{every=0}" if rule == "weight_mirror" else f"{rule}{{expand=2}}" if rule == "pfa" else rule
    compiled = gr.compile(model, spec, example_inputs=x, example_targets=y, blocks="layers")
    read = {
        "mlp": ["b.weight", "c.weight"],
        "bn-cnn": ["b.weight", "c.weight", "d.weight", "e.weight"],
        "transformer": ["attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight",
                        "token.weight"],
    }[net]  # fmt: skip
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in (compiled.parameters(), by_hand.parameters())]
    for number in range(2):
        own = dict(by_hand.named_parameters())
        step = {"number": number, "read": read}
        feedback = {n: expected_feedback(rule, n, own[n], compiled, step).clone() for n in read}
        for optimizer in optimizers:
            optimizer.zero_grad()
        compiled.loss(x, y).backward()
        F.cross_entropy(by_hand.by_hand(x, feedback).flatten(0, -2), y.flatten()).backward()
        expected = {n: p.grad for n, p in by_hand.named_parameters()}
        assert_close({n: p.grad for n, p in model.named_parameters()}, expected)
        assert any((expected[n] - g).abs().max() > 1e-6 for n, g in bp_grads(by_hand, x, y).items())
        for optimizer in optimizers:
            optimizer.step()
    certificates = compiled.report().certificates
    assert not certificates.weight_transport, certificates
    signs = {name for block in certificates.blocks for name in block.sign_reads}
    assert bool(signs) == (rule in ("usf", "brsf", "frsf"))
