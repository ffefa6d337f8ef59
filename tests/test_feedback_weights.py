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
            halves = zip(b.chunk(2), r.chunk(2), strict=True)
            return torch.cat([bg @ rg.flatten(1) for bg, rg in halves]).view_as(weight)
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


# --- what can be chosen --------------------------------------------------------------------------------------------


def three_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 4, (5,))


@pytest.mark.parametrize(
    ("options", "read"),
    [("", {"2.weight", "4.weight"}), ('only=["2"]', {"2.weight"}), ('skip=["2"]', {"4.weight"}), ('skip=["0"]', None)],
)
def test_only_and_skip(options, read):
    model, x, y = three_layers()
    compiled = gr.compile(model, f"fa{{{options}}}", example_inputs=x, example_targets=y)
    assert set(feedback_of(compiled)) == (read or {"2.weight", "4.weight"})


def test_a_skipped_module_keeps_its_exact_cotangent():
    model, x, y = three_layers()
    compiled = gr.compile(copy.deepcopy(model), 'fa{skip=["4"]}', example_inputs=x, example_targets=y)
    rule, exact = rule_grads(compiled, x, y), bp_grads(model, x, y)
    for name in ("2.weight", "4.weight"):
        torch.testing.assert_close(rule[name], exact[name])
    assert (rule["0.weight"] - exact["0.weight"]).abs().max() > 1e-3 * exact["0.weight"].abs().max()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('fa{only=["conv*"]}', "the glob 'conv\\*' matches no module"),
        ('fa{skip=["nothing"]}', "the glob 'nothing' matches no module"),
        ('kp{only=["0"]}', "nothing to replace"),
        ("usf{init=zeros}", "init='zeros' is unknown"),
        ("fa{distribution=cauchy}", "distribution='cauchy' is unknown"),
        ("brsf{distribution=cauchy}", "distribution='cauchy' is unknown"),
        ("fa{shared=true}", "has no option 'shared'"),
        ("pfa{expand=0}", "expand=0"),
        ("pfa{density=0}", "density=0"),
        ("pfa{orthogonal=true,density=0.5}", "dense"),
        ("pfa{decay=1}", "go together"),
        ("weight_mirror{every=-1}", "every=-1"),
        ("weight_mirror{amplitude=0}", "amplitude=0"),
        ({"0": "fa"}, "nothing to replace"),
    ],
)
def test_bad_options(spec, message):
    model, x, y = three_layers()
    with pytest.raises(gr.RuleError, match=message):
        gr.compile(model, spec, example_inputs=x, example_targets=y, blocks="layers")


def test_a_net_of_one_layer_has_nothing_to_replace():
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(gr.RuleError, match="nothing to replace"):
        gr.compile(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), "fa", example_inputs=x, example_targets=y)


@pytest.mark.parametrize("rule", ["fa", pytest.param("usf", marks=pytest.mark.slow)])
def test_an_error_that_is_not_finite_reaches_every_layer_as_under_backpropagation(rule):
    model, x, y = three_layers()
    with torch.no_grad():
        model[4].bias[0] = torch.inf
    compiled = gr.compile(copy.deepcopy(model), rule, example_inputs=x, example_targets=y, blocks="layers")
    assert all(g.isnan().any() for g in bp_grads(model, x, y).values())
    assert all(g.isnan().any() for g in rule_grads(compiled, x, y).values())


def test_outputs_that_are_no_tensor():
    """A dict works with a loss that reads it; the default loss says what it cannot read."""

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return {"answer": self.head(torch.tanh(self.body(x)))}

    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    with pytest.raises(gr.RuleError, match="cannot read outputs of type dict") as error:
        gr.compile(Answers(), "fa", example_inputs=x, example_targets=y)
    assert "loss=" in str(error.value)
    compiled = gr.compile(Answers(), "fa", loss=lambda outputs, y: F.cross_entropy(outputs["answer"], y))
    assert set(rule_grads(compiled, x, y)) == {n for n, _ in compiled.module.named_parameters()}


def test_part_of_a_model():
    """In a map of rules only the claimed blocks read feedback weights."""
    model, x, y = three_layers()
    compiled = gr.compile(copy.deepcopy(model), {"4": "fa"}, example_inputs=x, example_targets=y, blocks="layers")
    assert set(feedback_of(compiled)) == {"4.weight"}
    with torch.no_grad():
        feedback_of(compiled)["4.weight"].copy_(model[4].weight)
    assert_close(rule_grads(compiled, x, y), bp_grads(model, x, y))


@pytest.mark.parametrize(("init", "std"), [("xavier", (2 / (32 + 64)) ** 0.5), ("kaiming", (3 * 64) ** -0.5)])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_size_of_feedback_weights(init, std, distribution):
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 32))
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    compiled = gr.compile(
        model, f"fa{{init={init},distribution={distribution},scale=2}}", example_inputs=x, example_targets=y
    )
    held = feedback_of(compiled)["2.weight"]
    assert abs(held.std().item() / (2 * std) - 1) < 0.05
    assert (held.abs().max() <= 2 * std * 3**0.5) == (distribution == "uniform")


def test_brsf_draws_anew_in_every_step_and_repeats_by_seed():
    model, x, y = three_layers()

    def three_steps(seed, through_loss):
        compiled = gr.compile(copy.deepcopy(model), "brsf", example_inputs=x, example_targets=y, seed=seed)
        found = []
        for _ in range(3):
            compiled.zero_grad()
            (compiled.loss(x, y) if through_loss else gr.default_loss(compiled(x), y)).backward()
            found.append(compiled.module[0].weight.grad.clone())
        return found

    first, again, other, outside = (
        three_steps(0, True),
        three_steps(0, True),
        three_steps(1, True),
        three_steps(0, False),
    )
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    for left, right, third in zip(first, again, outside, strict=True):
        assert torch.equal(left, right)
        torch.testing.assert_close(left, third)


# --- state ---------------------------------------------------------------------------------------------------------


def test_learned_feedback_needs_to_be_materialised():
    model, x, y = three_layers()
    for rule in ("kp", "pfa"):
        compiled = gr.compile(copy.deepcopy(model), rule)
        with pytest.raises(gr.RuleError, match="learned state is not created yet"):
            list(compiled.parameters())
        compiled.materialize(x, y)
        assert len(list(compiled.parameters())) == 6 + 2
        groups = {g["name"]: len(g["params"]) for g in compiled.param_groups()}
        assert groups == {"0": 2, "2": 3, "4": 3}  # feedback weights go with the block that reads them


@pytest.mark.parametrize("rule", ["fa", "kp", "pfa", "weight_mirror"])
def test_state_travels_in_state_dict(rule):
    model, x, y = three_layers()
    one = gr.compile(copy.deepcopy(model), rule, example_inputs=x, example_targets=y, seed=0)
    two = gr.compile(copy.deepcopy(model), rule, example_inputs=x, example_targets=y, seed=1)
    one.loss(x, y)
    keys = [k for k in one.state_dict() if k.startswith(f"_graphrewrite.{rule}.feedback.")]
    assert keys == [f"_graphrewrite.{rule}.feedback.{n}.weight" for n in (2, 4)]
    assert not torch.equal(one.state_dict()[keys[0]], two.state_dict()[keys[0]])
    two.load_state_dict(one.state_dict())
    left, right = rule_grads(one, x, y), rule_grads(two, x, y)
    for name, held in left.items():
        if rule != "weight_mirror":  # its noise hangs on the seed
            assert torch.equal(held, right[name])
    assert set(one.module.state_dict()) == set(model.state_dict())


def test_frozen_weights():
    """A frozen W gives its B no gradient; cotangents still go through B."""
    model, x, y = three_layers()
    model[2].weight.requires_grad_(False)
    compiled = gr.compile(model, "kp", example_inputs=x, example_targets=y)
    compiled.loss(x, y).backward()
    feedback = feedback_of(compiled)
    assert feedback["2.weight"].grad is None
    assert feedback["4.weight"].grad is not None
    assert model[2].weight.grad is None


# --- the mirror phase ----------------------------------------------------------------------------------------------


def test_mirror_phase_is_the_formula():
    """B <- (1 - decay) B + rate / (N var) sum y x^T, from the same noise, layer by layer."""
    model, x, y = three_layers()
    compiled = gr.compile(
        model, "weight_mirror{every=0,rate=0.3,decay=0.2,amplitude=0.5}", example_inputs=x, example_targets=y
    )
    before = {n: held.clone() for n, held in feedback_of(compiled).items()}
    compiled.feedback_phase()
    for stream, (name, width) in enumerate({"2.weight": 7, "4.weight": 8}.items(), 1):
        noise = 0.5 * (random.uniform(torch.tensor([0, 0, 0]), stream, [5, width], torch.float64) - 0.5)
        weight = model.get_submodule(name[0]).weight.detach()
        answer = noise @ weight.t()
        expected = 0.8 * before[name] + 0.3 * (answer.t() @ noise) / (5 * 0.5**2 / 12)
        torch.testing.assert_close(feedback_of(compiled)[name], expected)


def test_mirror_phase_of_the_paper():
    """B <- B + eta sum x sigma(W x + b)^T."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Sigmoid(), nn.Linear(7, 8), nn.Sigmoid(), nn.Linear(8, 4)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 4, (5,))
    rule = "weight_mirror{every=0,decay=0,normalise=false,activation=true}"
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
    before = {n: held.clone() for n, held in feedback_of(compiled).items()}
    compiled.feedback_phase()
    noise = 0.1 * (random.uniform(torch.tensor([0, 0, 0]), 1, [5, 7], torch.float64) - 0.5)
    expected = before["2.weight"] + 0.01 * torch.sigmoid(model[2](noise)).t() @ noise
    torch.testing.assert_close(feedback_of(compiled)["2.weight"], expected)


@pytest.mark.parametrize("net", matrix(NETS))
def test_mirrored_weights_become_the_weights(net):
    """The mean of the correlation is W for every kind of layer: after many phases B points where W does."""
    torch.manual_seed(0)
    make, batch = NETS[net]
    model, (x, y) = make().double(), batch()
    compiled = gr.compile(model, "weight_mirror{every=0}", example_inputs=x, example_targets=y)
    own = dict(model.named_parameters())
    compiled.feedback_phase(x, times=700)
    for name, held in feedback_of(compiled).items():
        weight = own[name].detach()
        assert torch.cosine_similarity(held.flatten(), weight.flatten(), dim=0) > 0.97, name
        assert 0.9 < held.norm() / weight.norm() < 1.1, name


def test_schedule_of_the_mirror():
    """Every second training call starts with a phase; evaluation and alignment run none."""
    model, x, y = three_layers()
    compiled = gr.compile(model, "weight_mirror{every=2}", example_inputs=x, example_targets=y)

    def held():
        return feedback_of(compiled)["2.weight"].clone()

    changed = []
    for call_number in range(4):
        before = held()
        (compiled.loss(x, y) if call_number % 2 else gr.default_loss(compiled(x), y)).backward()
        changed.append(not torch.equal(before, held()))
        after = held()
        compiled.alignment(x, y)
        with torch.no_grad():
            compiled.loss(x, y)
        assert torch.equal(after, held())
    assert changed == [True, False, True, False]
    assert compiled.get_extra_state()["calls"] == 4


def test_mirror_phase_touches_nothing_else():
    """Neither the model nor torch's generator; steps that wait for their backward keep their B."""
    model, x, y = case_of("cnn")
    compiled = gr.compile(model, "weight_mirror", example_inputs=x, example_targets=y)
    first = compiled.loss(x, y)
    before = {n: held.clone() for n, held in model.state_dict().items()}
    generator = torch.get_rng_state()
    compiled.feedback_phase(times=2)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(held, before[n]) for n, held in model.state_dict().items())
    (first + compiled.loss(x, y)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_rules_without_a_feedback_phase_say_so():
    model, x, y = three_layers()
    with pytest.raises(gr.RuleError, match="has no feedback phase"):
        gr.compile(model, "fa", example_inputs=x, example_targets=y).feedback_phase()
    with pytest.raises(gr.RuleError, match="nothing is captured yet"):
        gr.compile(model, "weight_mirror").feedback_phase()


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 7)
        self.b = nn.utils.parametrizations.weight_norm(nn.Linear(7, 4))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_weight_normalisation():
    """The normalisation is applied to the feedback weights; a mirror of it is not defined."""
    torch.manual_seed(0)
    model, x, y = Normed().double(), torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 4, (5,))
    compiled = gr.compile(copy.deepcopy(model), "fa", example_inputs=x, example_targets=y)
    own, feedback = dict(model.named_parameters()), feedback_of(compiled)
    assert set(feedback) == {n for n in own if n.startswith("b.parametrizations")}
    with torch.no_grad():
        for name, held in feedback.items():
            held.copy_(own[name])
    assert_close(rule_grads(compiled, x, y), bp_grads(model, x, y))
    mirrored = gr.compile(copy.deepcopy(model), "weight_mirror")
    with pytest.raises(gr.RuleError, match="non-linear function of parameters"):
        mirrored.feedback_phase(x)
