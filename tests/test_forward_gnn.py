"""ForwardGNN against independent loops over graphs that are built edge by edge."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import gradients
from helpers import assert_close

CLASSES, NODES = 5, 13


def case(name: str = "gcn"):
    """A graph model in float64, a graph whose nodes are labelled in part, and all labels."""
    one = zoo.make(name)
    torch.manual_seed(4)
    (x, edges), y = one.batch(4)
    y[:CLASSES] = torch.arange(CLASSES)
    partly = y.clone()
    partly[8:] = -100
    return one.model.double(), (x.double(), edges), partly


def joined(edges, labels):
    """Edges in both directions between labelled nodes and the virtual node of their class; no extra node."""
    found = edges.t().tolist()
    for i, c in enumerate(labels.tolist()):
        if c >= 0:
            found += [[i, NODES + c], [NODES + c, i]]
    return torch.tensor(found).t()


def unit(h):
    return h / h.norm(dim=1, keepdim=True).clamp(min=1e-12)


def layer_outputs(model, x, edges, signals=None):
    """Outputs of all layers, each on the normalised and detached output before it."""
    found, h = [], x
    for i, conv in enumerate(model.convs):
        h = unit(h.detach())
        if signals is not None and i + 1 < len(model.convs):
            stored, matrix = signals[i]
            h = h + unit(stored) @ matrix.t()
        out = conv(h, edges)
        found.append(out.relu() if i + 1 < len(model.convs) else out)
        h = found[-1]
    return found


def products(h):
    return h[:NODES] @ h[NODES : NODES + CLASSES].t()


@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
def test_single_forward_pass(name):
    model, (x, edges), y = case(name)
    other = copy.deepcopy(model)
    compiled = gr.compile(model, "forward_gnn", example_inputs=(x, edges), example_targets=y)
    virtual = compiled.rule_state["forward_gnn.virtual"]
    assert virtual.shape == (CLASSES, 6)
    total = compiled.loss((x, edges), y)
    total.backward()
    outs = layer_outputs(other, torch.cat([x, virtual]), joined(edges, y))
    labelled = y >= 0
    losses = [F.cross_entropy(products(h)[labelled], y[labelled]) for h in outs]
    sum(losses).backward()
    torch.testing.assert_close(total, sum(losses))
    assert_close(gradients(model), gradients(other))
    assert list(compiled.losses) == ["convs.0", "convs.1", "convs.2"]
    expected = sum(products(h).softmax(1) for h in outs)
    torch.testing.assert_close(compiled.predict((x, edges)), expected.detach())
    certificates = compiled.report().certificates
    assert certificates.forward_passes == 1
    assert certificates.locality_radius == 0
    assert not certificates.update_locked
    assert not certificates.weight_transport


def test_top_to_loss():
    """What is scored is the mean of a layer's output and the outputs above that are as wide, a step old."""
    model, (x, edges), y = case()
    other = copy.deepcopy(model)
    compiled = gr.compile(model, "forward_gnn{top_down=loss}", example_inputs=(x, edges), example_targets=y)
    virtual = compiled.rule_state["forward_gnn.virtual"]
    compiled.loss((x, edges), y).backward()
    with torch.no_grad():
        stored = layer_outputs(other, torch.cat([x, virtual]), joined(edges, y))
        for mine in (model, other):
            mine.convs[1].lin.weight.mul_(1.5)  # as an optimizer would
    compiled.zero_grad()
    total = compiled.loss((x, edges), y)
    total.backward()
    outs = layer_outputs(other, torch.cat([x, virtual]), joined(edges, y))
    outs[0] = (outs[0] + stored[1]) / 2  # the last layer is narrower
    expected = sum(F.cross_entropy(products(h), y, ignore_index=-100) for h in outs)
    expected.backward()
    torch.testing.assert_close(total, expected)
    assert_close(gradients(model), gradients(other))


def test_top_to_input():
    model, (x, edges), y = case()
    other = copy.deepcopy(model)
    compiled = gr.compile(model, "forward_gnn{top_down=input}", example_inputs=(x, edges), example_targets=y)
    virtual = compiled.rule_state["forward_gnn.virtual"]
    learned = {n: p for n, p in compiled.named_parameters() if n.startswith("_graphrewrite")}
    assert {n: tuple(p.shape) for n, p in learned.items()} == {
        "_graphrewrite.forward_gnn.top_down.convs.0": (6, 8),
        "_graphrewrite.forward_gnn.top_down.convs.1": (8, 5),
    }
    own = []
    with torch.no_grad():
        for p in learned.values():
            p.normal_()
            own.append(p.detach().clone().requires_grad_())
    start = torch.cat([x, virtual])
    zero = [(torch.zeros(1, 8).double(), own[0]), (torch.zeros(1, 5).double(), own[1])]
    stored = [h.detach() for h in layer_outputs(other, start, joined(edges, y), zero)]
    compiled.loss((x, edges), y)
    total = compiled.loss((x, edges), y)
    total.backward()
    outs = layer_outputs(other, start, joined(edges, y), [(stored[1], own[0]), (stored[2], own[1])])
    expected = sum(F.cross_entropy(products(h), y, ignore_index=-100) for h in outs)
    expected.backward()
    torch.testing.assert_close(total, expected)
    assert_close(gradients(model), gradients(other))
    for ours, theirs in zip(learned.values(), own, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def goodness_loss(outs_p, outs_n, labelled):
    total = 0.0
    for i in range(len(outs_p)):
        p = outs_p[i][:NODES].pow(2).sum(1)[labelled] - 2.0
        n = [o[i][:NODES].pow(2).sum(1)[labelled] - 2.0 for o in outs_n]
        wrong = torch.stack([-torch.sigmoid(-v).log() for v in n]).mean(0)
        total = total + 0.5 * (-torch.sigmoid(p).log() + wrong).mean()
    return total


def shifted(y, k):
    return torch.where(y >= 0, (y + k) % CLASSES, y)


def coded(x, y):
    x = x.clone()
    for i, c in enumerate(y.tolist()):
        x[i, :CLASSES] = F.one_hot(torch.tensor(c), CLASSES) if c >= 0 else 1 / CLASSES
    return x


@pytest.mark.slow
@pytest.mark.parametrize("method", ["label", "virtual"])
def test_goodness_methods(method):
    """All other classes as negatives, on the labelled nodes."""
    model, (x, edges), y = case()
    other = copy.deepcopy(model)
    compiled = gr.compile(model, f"forward_gnn{{method={method}}}", example_inputs=(x, edges), example_targets=y)

    def outputs(labels):
        if method == "label":
            return layer_outputs(other, coded(x, labels), edges)
        start = torch.cat([x, compiled.rule_state["forward_gnn.virtual"]])
        return layer_outputs(other, start, joined(edges, labels))

    total = compiled.loss((x, edges), y)
    total.backward()
    expected = goodness_loss(outputs(y), [outputs(shifted(y, k)) for k in range(1, CLASSES)], y >= 0)
    expected.backward()
    torch.testing.assert_close(total, expected)
    assert_close(gradients(model), gradients(other))

    scores = []
    for c in range(CLASSES):
        outs = outputs(torch.where(y < 0, c, y))
        scores.append(sum(h[:NODES].pow(2).mean(1) - 2.0 for h in outs))
    predicted, free = compiled.predict((x, edges)), y < 0
    torch.testing.assert_close(predicted[free], torch.stack(scores, 1)[free].detach())
    assert torch.equal(predicted[~free].argmax(1), y[~free])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["single", "label", "virtual"])
def test_no_later_parameter_enters_a_gradient(method):
    seen = []
    for shift in (0.0, 1.0):
        model, inputs, y = case()
        compiled = gr.compile(model, f"forward_gnn{{method={method}}}")
        with torch.no_grad():
            for conv in model.convs[1:]:
                conv.lin.weight.add_(shift)
        compiled.loss(inputs, y).backward()
        seen.append(model.convs[0].lin.weight.grad)
    assert torch.equal(*seen)


def test_bad_input():
    model, (x, edges), y = case()
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    with pytest.raises(gr.RuleError, match="edge_index"):
        gr.compile(mlp, "forward_gnn").loss(x, y)
    with pytest.raises(gr.RuleError, match="belongs to method='single'"):
        gr.compile(model, "forward_gnn{method=label,top_down=loss}").loss((x, edges), y)
    with pytest.raises(gr.RuleError, match="method='other' is unknown"):
        gr.compile(model, "forward_gnn{method=other}").loss((x, edges), y)
    tapering = copy.deepcopy(model)
    del tapering.convs[1]
    with pytest.raises(gr.RuleError, match="as wide, and there is none: the layers have 8, 5 features"):
        gr.compile(tapering, "forward_gnn{top_down=loss}").loss((x, edges), y)
    compiled = gr.compile(model, "forward_gnn", example_inputs=(x, edges), example_targets=y)
    with pytest.raises(gr.RuleError, match="label 9 is out of range"):
        compiled.loss((x, edges), y.clamp(max=0) + 9)
    with pytest.raises(gr.RuleError, match="forward_gnn"):
        compiled.predict((x[:7], edges % 7))  # other nodes than those of the training graph
    with pytest.raises(gr.RuleError, match="no backward through compiled"):
        compiled(x, edges).sum().backward()
