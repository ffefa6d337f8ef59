"""PEPITA against the formula, its first-order limit, its certificate, and what it does about noise and batch-norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.graph.nodes import BufferUpdate
from graphrewrite.testing import zoo
from helpers import assert_close, assert_golden, cotangents_of_other_blocks, eager_grads, train_step


def net(bias: bool = True) -> nn.Sequential:
    layers = [nn.Linear(6, 8, bias), nn.ReLU(), nn.Linear(8, 7, bias), nn.ReLU(), nn.Linear(7, 3, bias)]
    return nn.Sequential(*layers).double()


def batch(n: int = 5):
    return torch.randn(n, 6).double(), torch.randint(0, 3, (n,))


def compiled_for(model, rule, x, y, **options):
    return gr.compile(model, rule, example_inputs=x, example_targets=y, blocks="layers", **options)


def passes(model, x):
    """Activities, the input first, and the answer."""
    hidden = [x]
    for i in (0, 2):
        hidden.append(torch.relu(model[i](hidden[-1])))
    return hidden, model[4](hidden[-1])


@pytest.mark.parametrize(
    ("options", "presynaptic", "last"),
    [
        ("", 1, 1),
        ("{presynaptic=clean}", 0, 0),
        pytest.param("{last=clean}", 1, 0, marks=pytest.mark.slow),
        pytest.param("{distribution=normal,scale=0.3}", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_mlp_by_hand(options, presynaptic, last):
    """G_l = (h_l - h'_l) h'_(l-1)^T / N, with the other choices of presynaptic term and last error."""
    model, (x, y) = net(), batch()
    compiled = compiled_for(model, f"pepita{options}", x, y)
    grads = train_step(compiled, x, y)
    with torch.no_grad():
        projection = compiled.rule_state["pepita.feedback"]
        clean, answer = passes(model, x)
        error = answer.softmax(1) - F.one_hot(y, 3)
        changed, again = passes(model, x + error @ projection)
        errors = (error, again.softmax(1) - F.one_hot(y, 3))
        before = (clean, changed)[presynaptic]
        deltas = [*(h - h2 for h, h2 in zip(clean[1:], changed[1:], strict=True)), errors[last]]
        expected = {}
        for name, delta, h in zip(("0", "2", "4"), deltas, before, strict=True):
            expected |= {f"{name}.weight": delta.T @ h / 5, f"{name}.bias": delta.mean(0)}
    assert_close(grads, expected)


def test_conv_net_by_hand():
    """A mean over positions; pooling and dropout behind the non-linearity; one dropout mask for both passes."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3),
        nn.Conv2d(4, 5, 2), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(20, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(4, 2, 8, 8).double(), torch.randint(0, 3, (4,))
    compiled = compiled_for(model, "pepita", x, y)
    torch.manual_seed(3)
    grads = train_step(compiled, x, y)
    torch.manual_seed(3)
    masks = [F.dropout(torch.ones(4, 4, 3, 3).double(), 0.3), F.dropout(torch.ones(4, 5, 2, 2).double(), 0.4)]

    def run(x):
        first = torch.relu(model[0](x))
        pooled = F.max_pool2d(first, 2) * masks[0]
        second = torch.relu(model[4](pooled)) * masks[1]
        return first, pooled, second, model[8](second.flatten(1))

    with torch.no_grad():
        clean = run(x)
        error = clean[-1].softmax(1) - F.one_hot(y, 3)
        new = x + (error @ compiled.rule_state["pepita.feedback"]).reshape(x.shape)
        changed = run(new)
    first, second = clean[0] - changed[0], clean[2] - changed[2]
    expected = {}
    # dropout stands behind the pooling here, so the first activity is the rectified one
    for name, delta, before, kernel in (("0", first, new, 3), ("4", second, changed[1], 2)):
        patches = F.unfold(before, kernel)
        flat = delta.flatten(2)
        weight = torch.einsum("bcp,bkp->ck", flat, patches) / flat.shape[2] / 4
        expected[f"{name}.weight"] = weight.reshape(model[int(name)].weight.shape)
        expected[f"{name}.bias"] = flat.mean((0, 2))
    last = changed[-1].softmax(1) - F.one_hot(y, 3)
    expected |= {"8.weight": last.T @ changed[2].flatten(1) / 4, "8.bias": last.mean(0)}
    assert_close(grads, expected)


def test_first_order_limit():
    """Identity 14: h_1 - h'_1 -> -phi'(z_1) W_1 F e as F -> 0 (adaptive feedback alignment), off by the order of F."""
    model, (x, y) = net(bias=False), batch()
    errors = []
    for scale in (1e-5, 1e-6):
        compiled = compiled_for(model, f"pepita{{scale={scale}}}", x, y)
        grads = train_step(compiled, x, y)
        with torch.no_grad():
            (_, first, second), answer = passes(model, x)
            moved = (answer.softmax(1) - F.one_hot(y, 3)) @ compiled.rule_state["pepita.feedback"]
            one = moved @ model[0].weight.T * (first > 0)
            two = one @ model[2].weight.T * (second > 0)
            expected = {"0.weight": -one.T @ x / 5, "2.weight": -two.T @ first / 5}
        errors.append(max((grads[n] - w).abs().max() / w.abs().max() for n, w in expected.items()))
    assert errors[0] < 1e-4
    assert errors[1] < 1e-5
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


def test_per_sample_error_and_a_loss_that_is_scaled():
    """A repeated batch leaves the mean where it is; (3 loss).backward() triples it."""
    model, (x, y) = net(), batch()
    compiled = compiled_for(model, "pepita", x, y)
    grads = train_step(compiled, x, y)
    assert_close(train_step(compiled, x.repeat(3, 1), y.repeat(3)), grads, rtol=1e-12)
    compiled.zero_grad()
    (3 * compiled.loss(x, y)).backward()
    assert_close({n: p.grad / 3 for n, p in model.named_parameters()}, grads, rtol=1e-12)


def test_certificate_and_graph():
    """No weight is transported and no cotangent crosses; the update waits for the clean pass; two passes."""
    model, (x, y) = net(), batch()
    compiled = compiled_for(model, "pepita", x, y)
    certificates = compiled.report().certificates
    *hidden, last = certificates.blocks
    assert not certificates.weight_transport
    assert not certificates.backward_locked
    assert all(b.update_locked and b.global_error for b in hidden)
    assert not last.update_locked
    assert (certificates.forward_passes, certificates.backward_depth) == (2, 1)
    assert not cotangents_of_other_blocks(compiled.graph("operator"))
    assert_golden(compiled.graph("operator"), "mlp_pepita")


@pytest.mark.slow
def test_batch_norm_keeps_the_statistics_of_the_clean_pass():
    case = zoo.make("cnn")
    x, y = case.batch(6)
    reference = zoo.make("cnn").model
    reference.load_state_dict(case.model.state_dict())
    compiled = gr.compile(case.model, "pepita", example_inputs=x, example_targets=y)
    compiled.loss(x, y).backward()
    reference(x)
    for name, held in reference.named_buffers():
        assert torch.equal(held, dict(case.model.named_buffers())[name]), name
    updates = [n for s, n in compiled.graph("operator").outputs.items() if isinstance(s, BufferUpdate)]
    assert updates
    assert all(not n.meta["gr"].copy for n in updates)


@pytest.mark.slow
def test_a_head_of_another_rule_learns_from_the_clean_pass():
    model, (x, y) = net(), batch()
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    grads = train_step(compiled_for(model, {"0": "pepita", "2": "pepita", "4": "bp"}, x, y), x, y)
    assert_close({n: g for n, g in grads.items() if n[0] == "4"}, {n: g for n, g in exact.items() if n[0] == "4"})
    alone = train_step(compiled_for(model, "pepita", x, y), x, y)
    assert_close({n: g for n, g in grads.items() if n[0] != "4"}, {n: g for n, g in alone.items() if n[0] != "4"})


# --- what it refuses -------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(F.rrelu(self.first(x), training=True))


def test_refuses_noise_that_cannot_be_repeated():
    x, y = batch()
    with pytest.raises(gr.RuleError, match=r"same random numbers; aten\.rrelu"):
        compiled_for(Noisy().double(), "pepita", x, y)


def test_refuses_integer_inputs():
    model = nn.Sequential(nn.Embedding(4, 6), nn.Flatten(), nn.Linear(18, 3))
    x, y = torch.randint(0, 4, (5, 3)), torch.randint(0, 3, (5,))
    with pytest.raises(gr.RuleError, match=r"floating-point input.*torch\.int64"):
        compiled_for(model, "pepita", x, y)


@pytest.mark.parametrize(
    ("rule", "text"),
    [("pepita{scale=0}", "changes no input"), ("pepita{presynaptic=old}", "presynaptic='old' is unknown")],
)
def test_refuses_options(rule, text):
    x, y = batch()
    with pytest.raises(gr.RuleError, match=text):
        compiled_for(net(), rule, x, y)


def test_refuses_one_block_and_the_plain_call():
    x, y = batch()
    with pytest.raises(gr.RuleError, match="at least one block before"):
        compiled_for(nn.Linear(6, 3).double(), "pepita", x, y)
    with pytest.raises(gr.RuleError, match=r"compiled\.loss"):
        F.cross_entropy(gr.compile(net(), "pepita")(x), y).backward()
