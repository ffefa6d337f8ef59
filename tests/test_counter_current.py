"""Counter-current learning against an independent loop over both networks."""

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

CLASSES, BATCH = 4, 6


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(9, 7), nn.ELU(), nn.Linear(7, 5), nn.ELU(), nn.Linear(5, CLASSES)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(BATCH, 9, generator=generator).double(), torch.tensor([0, 2, 1, 3, 3, 0])


def pairwise(a, b, y, *, scale=0.5, unit=False, decorrelation=0.0, margin=0.0):
    """Sample by sample and class by class."""
    n = a.shape[1]
    if unit:
        a = a / a.norm(dim=1, keepdim=True)
        b = b / b.norm(dim=1, keepdim=True)
    rows = []
    for i in range(len(y)):
        if y[i] < 0:
            continue
        errors = torch.stack([(a[i] @ b[c] - float(y[i] == c)) for c in range(len(b))])
        if errors.detach().abs().max() >= margin:
            rows.append(errors.pow(2).mean())
    value = torch.stack(rows).mean() if rows else 0.0
    if decorrelation:
        apart = [(b[c] @ b[k]) ** 2 for c in range(len(b)) for k in range(len(b)) if c != k]
        spread = [(a[i] @ a[j]) ** 2 for i in range(len(y)) for j in range(len(y)) if y[i] != y[j]]
        value = value + decorrelation * (torch.stack(apart).mean() + torch.stack(spread).mean())
    return 256 * scale / n * value


@pytest.mark.parametrize(
    "options", [{}, {"scale": 2.0}, {"unit": True}, {"decorrelation": 0.5}, {"margin": 0.9}], ids=str
)
def test_step_against_the_papers_loop(options):
    model, (x, y) = mlp(), batch()
    text = {("normalise" if k == "unit" else k): ("always" if k == "unit" else v) for k, v in options.items()}
    rule = "counter_current{" + ",".join(f"{k}={v}" for k, v in text.items()) + "}"
    compiled = gr.compile(model, rule, example_inputs=x, example_targets=y)
    state = dict(compiled.named_parameters())
    mirrors = [state[f"_graphrewrite.counter_current.mirror.{i}.0"] for i in range(3)]
    # transposed weights: the widths of the captured graph, run the other way
    assert [tuple(v.shape) for v in mirrors] == [(9, 7), (7, 5), (5, CLASSES)]
    total = compiled.loss(x, y)
    total.backward()

    other = mlp()
    own = [v.detach().clone().requires_grad_() for v in mirrors]
    a = [x, other[0:2](x)]
    a.append(other[2:4](a[1].detach()))
    logits = other[4](a[2].detach())
    b = [None, None, F.elu(torch.eye(CLASSES).double() @ own[2].t())]
    b[1] = F.elu(b[2].detach() @ own[1].t())
    b[0] = F.elu(b[1].detach() @ own[0].t())
    expected = F.cross_entropy(logits, y) + sum(pairwise(a[i], b[i], y, **options) for i in range(3))
    expected.backward()
    torch.testing.assert_close(total, expected)
    assert_close(gradients(model), gradients(other))
    for ours, theirs in zip(mirrors, own, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_generated_mirrors_where_the_block_is_no_chain():
    """A map is met by its mean over positions; the mirror is one linear map of its channels."""
    model = zoo.make("cnn").model.double()
    model.features[7].p = 0.0
    x, y = torch.randn(5, 1, 8, 8).double(), torch.randint(0, 5, (5,))
    reference = copy.deepcopy(model)
    compiled = gr.compile(model, "counter_current", example_inputs=x, example_targets=y)
    state = dict(compiled.named_parameters())
    top, middle = (state[f"_graphrewrite.counter_current.mirror.{i}.0"] for i in (2, 1))
    assert "_graphrewrite.counter_current.mirror.0.0" not in state  # images are no vector to meet
    compiled.loss(x, y).backward()
    first = reference.features[:4](x)
    second = reference.features[4:](first.detach()).flatten(1)
    b2 = F.elu(torch.eye(5).double() @ top.detach().t())
    b1 = F.elu(b2 @ middle.detach().t())
    loss = F.cross_entropy(reference.classifier(second.detach()), y) + pairwise(second, b2, y)
    loss = loss + pairwise(first.mean((2, 3)), b1, y, unit=True)
    loss.backward()
    assert_close(gradients(model), gradients(reference), 1e-8)


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet", "vit", "bert", "gcn"))]
)
def test_models(name):
    case = zoo.make(name)
    x, y = case.batch(case.sizes[0])
    compiled = gr.compile(case.model, "counter_current", loss=case.loss, example_inputs=x, example_targets=y)
    learned = [p for n, p in compiled.named_parameters() if n.startswith("_graphrewrite")]
    assert learned
    for size in case.sizes[:2]:
        compiled.zero_grad()
        compiled.loss(*case.batch(size)).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in compiled.parameters())
    assert all(p.grad is not None for p in learned)
    certificates = compiled.report().certificates
    assert certificates.locality_radius == 0
    assert not certificates.update_locked
    assert not certificates.weight_transport
    assert not certificates.global_error


def test_no_later_parameter_enters_a_gradient():
    seen = []
    for shift in (0.0, 1.0):
        model = mlp()
        compiled = gr.compile(model, "counter_current")
        with torch.no_grad():
            model[2].weight.add_(shift)
            model[4].weight.add_(shift)
        compiled.loss(*batch()).backward()
        seen.append(model[0].weight.grad)
    assert torch.equal(*seen)


def test_prediction_is_the_models_own_forward():
    model, (x, _) = mlp(), batch()
    assert torch.equal(gr.compile(model, "counter_current").predict(x), model(x))


def test_samples_without_a_label_do_not_count():
    (x, y), found = batch(), []
    partly = torch.cat([y, torch.tensor([-100, -100])])
    for inputs, labels in ((x, y), (torch.cat([x, x[:2]]), partly)):
        model = mlp()
        gr.compile(model, "counter_current").loss(inputs, labels).backward()
        found.append(gradients(model))
    assert_close(*found)


class _Pooled(nn.Module):
    """One answer for every three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).unflatten(0, (-1, 3)).sum(1))


@pytest.mark.parametrize("rule", ["counter_current", "ff"])
def test_a_label_for_several_rows_is_refused(rule):
    with pytest.raises(gr.RuleError, match="4 labels for 12 rows, numbers that need not be the same"):
        gr.compile(_Pooled(), rule, blocks="layers").loss(torch.randn(12, 6), torch.randint(0, CLASSES, (4,)))


def test_bad_input():
    x, y = batch()
    compiled = gr.compile(mlp(), "counter_current")
    with pytest.raises(gr.RuleError, match="materialize"):
        list(compiled.parameters())
    with pytest.raises(gr.RuleError, match="label 4 is out of range"):
        compiled.loss(x, y + 1)
    with pytest.raises(gr.RuleError, match="needs targets"):
        gr.compile(mlp(), "counter_current", example_inputs=x)
    with pytest.raises(gr.RuleError, match="normalise='maybe' is unknown"):
        gr.compile(mlp(), "counter_current{normalise=maybe}").loss(x, y)
    with pytest.raises(gr.RuleError, match="one integer class per sample"):
        gr.compile(mlp(), "counter_current", loss=F.mse_loss).loss(x, torch.randn(BATCH, CLASSES).double())
    with pytest.raises(gr.RuleError, match="no backward through compiled"):
        gr.compile(mlp(), "counter_current")(x).sum().backward()
