"""FOTON: backpropagation on orthonormal linear nets, its formula, and the orthonormalisation between steps."""

from __future__ import annotations

import pytest
import torch
from graphrewrite.passes.rules.foton import orthonormalised
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from helpers import assert_close, assert_golden, eager_grads, train_step


def net(*between: nn.Module) -> nn.Sequential:
    layers = [nn.Linear(8, 7, False), *between, nn.Linear(7, 6, False), *between, nn.Linear(6, 3, False)]
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.orthogonal_(parameter)
    return model


def batch(n: int = 5):
    return torch.randn(n, 8).double(), torch.randint(0, 3, (n,))


def compiled_for(model, rule, x, y):
    return gr.compile(model, rule, example_inputs=x, example_targets=y, blocks="layers")


def off(weight: torch.Tensor) -> float:
    rows = weight.flatten(1)
    rows = rows if rows.shape[0] <= rows.shape[1] else rows.t()
    return float((rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype)).detach().abs().max())


def test_linear_net_with_orthonormal_rows_is_backpropagation():
    model, (x, y) = net(), batch()
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    assert_close(train_step(compiled_for(model, "foton{iterations=0}", x, y), x, y), exact, rtol=2e-15)


@pytest.mark.slow
def test_without_orthonormal_rows_it_is_not():
    model, (x, y) = net(), batch()
    for parameter in model.parameters():
        nn.init.xavier_uniform_(parameter)
    exact = eager_grads(model, F.cross_entropy(model(x), y))
    grads = train_step(compiled_for(model, "foton{iterations=0}", x, y), x, y)
    cosines = [F.cosine_similarity(grads[n].flatten(), exact[n].flatten(), 0) for n in ("0.weight", "1.weight")]
    assert all(0 < c < 0.97 for c in cosines)


def test_mlp_by_hand():
    """x' = x - F e with F = (W_3 W_2 W_1)^T; non-linearities and dropout have no part in F."""
    model, (x, y) = net(nn.ReLU(), nn.Dropout(0.2)), batch()
    compiled = compiled_for(model, "foton", x, y)
    torch.manual_seed(2)
    grads = train_step(compiled, x, y)
    torch.manual_seed(2)
    masks = [F.dropout(torch.ones(5, n).double(), 0.2) for n in (7, 6)]
    first, second, third = model[0].weight, model[3].weight, model[6].weight

    def run(x):
        one = torch.relu(x @ first.T) * masks[0]
        two = torch.relu(one @ second.T) * masks[1]
        return x, one, two, two @ third.T

    with torch.no_grad():
        clean = run(x)
        error = clean[3].softmax(1) - F.one_hot(y, 3)
        changed = run(x - error @ (third @ second @ first))
        expected = {
            "0.weight": (clean[1] - changed[1]).T @ x / 5,
            "3.weight": (clean[2] - changed[2]).T @ clean[1] / 5,
            "6.weight": error.T @ clean[2] / 5,
        }
    assert_close(grads, expected)


def test_conv_net_by_hand():
    """The error goes back through kernels and pooling; the mean is over positions, too."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3, bias=False)
    ).double()
    x, y = torch.randn(4, 2, 6, 6).double(), torch.randint(0, 3, (4,))
    compiled = compiled_for(model, "foton{presynaptic=clean}", x, y)
    grads = train_step(compiled, x, y)
    kernel, weight = model[0].weight.detach(), model[4].weight.detach()
    rectified = torch.relu(F.conv2d(x, kernel))
    features = F.avg_pool2d(rectified, 2).flatten(1)
    error = (features @ weight.T).softmax(1) - F.one_hot(y, 3)
    spread = (error @ weight).reshape(4, 4, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    delta = rectified - torch.relu(F.conv2d(x - F.conv_transpose2d(spread, kernel), kernel))
    by_hand = torch.einsum("bcp,bkp->ck", delta.flatten(2), F.unfold(x, 3)) / 16 / 4
    assert_close(grads, {"0.weight": by_hand.reshape(kernel.shape), "4.weight": error.T @ features / 4})


def test_certificate_and_graph():
    """The error comes back through every block and its weights, as in backpropagation."""
    model, (x, y) = net(nn.ReLU()), batch()
    compiled = compiled_for(model, "foton", x, y)
    *hidden, last = compiled.report().certificates.blocks
    assert all(b.weight_transport and b.backward_locked and b.update_locked and b.global_error for b in hidden)
    assert hidden[0].weight_transport.path[-1] in ("parameter 2.weight", "parameter 4.weight")
    assert not last.weight_transport
    assert compiled.report().certificates.forward_passes == 2
    assert_golden(compiled.graph("operator"), "mlp_foton")


# --- orthonormalisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 3, 2, 2)])
def test_bjorck_finds_the_nearest_orthonormal_matrix(shape):
    """The iteration leaves the singular vectors alone and moves every singular value to 1."""
    weight = nn.init.orthogonal_(torch.empty(shape).double()) + 0.1 * torch.randn(shape).double()
    made = orthonormalised(weight, torch.tensor([0, 0, 0]), 1, 20, 10)
    left, _, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    assert (made.flatten(1) - left @ right).abs().max() < 1e-12


def test_weights_are_orthonormalised_after_the_optimizer_step():
    """At the next call or at `state_dict`, once; not between the steps of an accumulated gradient."""
    model, (x, y) = net(nn.ReLU()), batch()
    compiled = compiled_for(model, "foton", x, y)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1.0)
    first, second = compiled.loss(x, y), compiled.loss(x, y)
    (first + second).backward()
    optimizer.step()
    assert off(model[0].weight) > 0.05
    held = compiled.state_dict()["0.weight"]
    assert off(held) < 1e-12
    version = model[0].weight._version
    compiled.loss(x, y).backward()
    assert model[0].weight._version == version
    optimizer.step()
    compiled.eval()(x)
    assert off(model[0].weight) < 1e-12
    with torch.no_grad():
        model[2].weight.mul_(1.5)
    compiled.loss(x, y)
    assert max(off(p) for p in model.parameters()) < 1e-12


@pytest.mark.slow
def test_the_phase_draws_nothing_from_torch_and_depends_on_no_rank():
    (x, y), found = batch(), []
    for rank in (0, 3):
        torch.manual_seed(1)
        model = net()
        compiled = compiled_for(model, "foton", x, y)
        compiled._rank = rank
        with torch.no_grad():
            model[0].weight.add_(0.1)
        state = torch.get_rng_state()
        compiled.loss(x, y)
        assert torch.equal(state, torch.get_rng_state())
        found.append(model[0].weight.detach().clone())
    assert torch.equal(*found)


def test_refuses_counts_that_are_none():
    x, y = batch()
    with pytest.raises(gr.RuleError, match="cannot orthonormalise"):
        compiled_for(net(), "foton{iterations=-1}", x, y)
