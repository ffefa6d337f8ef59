"""`mono_forward` against a plain PyTorch loop: detach, a matrix per block, the task's loss."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.errors import RuleError
from graphrewrite.testing import zoo
from helpers import assert_close


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(0, 3, (n,))


def compiled_grads(compiled, x, y) -> dict[str, torch.Tensor]:
    compiled.zero_grad()
    torch.manual_seed(0)
    compiled.loss(x, y).backward()
    return {name: p.grad.clone() for name, p in compiled.named_parameters()}


def loop(model: nn.Sequential, heads: dict[str, torch.Tensor], x, y, loss=F.cross_entropy):
    """Mono-Forward as the paper states it: logits M_l h_l, h_l detached between layers; the last layer on the task."""
    model = copy.deepcopy(model)
    heads = {name: m.detach().clone().requires_grad_() for name, m in heads.items()}
    h, losses = x, {}
    for name in ("0", "2"):
        h = model[int(name) + 1](model[int(name)](h.detach()))
        losses[name] = loss(h @ heads[name].t(), y)
    losses["task"] = loss(model[4](h.detach()), y)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads.update({f"_graphrewrite.mono_forward.head.{name}.weight": m.grad for name, m in heads.items()})
    return grads, losses


def heads_of(compiled) -> dict[str, torch.Tensor]:
    return {name: compiled.rule_state[f"mono_forward.head.{name}.weight"] for name in ("0", "2")}


def test_gradients_are_those_of_the_loop_and_stay_so_while_training():
    model, (x, y) = mlp(), data()
    compiled = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.5, momentum=0.9)
    for n in (5, 9, 2):
        x, y = data(n)
        wanted, losses = loop(model, heads_of(compiled), x, y)
        assert_close(compiled_grads(compiled, x, y), wanted, rtol=1e-12)
        assert compiled.losses.keys() == losses.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(compiled.losses[name], loss.detach())
        optimizer.step()
    # the same numbers without a gradient
    wanted_loss = sum(loop(model, heads_of(compiled), x, y)[1].values()).detach()
    with torch.no_grad():
        torch.testing.assert_close(compiled.loss(x, y), wanted_loss)


def test_the_heads_start_from_a_normal_of_variance_two_over_n():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 50))
    x, y = torch.randn(3, 4), torch.randint(0, 50, (3,))
    compiled = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    head = compiled.rule_state["mono_forward.head.0.weight"]
    assert head.shape == (50, 400)
    assert abs(head.std().item() / math.sqrt(2 / 400) - 1) < 0.03
    assert list(dict(compiled.named_parameters())) == [
        "0.weight", "0.bias", "2.weight", "2.bias", "_graphrewrite.mono_forward.head.0.weight",
    ]  # fmt: skip


def test_it_is_local_loss_with_the_pred_head():
    """Identity: the same gradients, once the heads hold the same matrices and no bias."""
    model, (x, y) = mlp(), data()
    ours = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    head = '{head="pred{bias=false}"}'
    other = gr.compile(model, f"local_loss{head}", example_inputs=(x,), example_targets=y, blocks="layers")
    with torch.no_grad():
        for name, m in heads_of(ours).items():
            other.rule_state[f"local_loss.head.{name}.weight"].copy_(m)
    left, right = compiled_grads(ours, x, y), compiled_grads(other, x, y)
    for name, grad in left.items():
        assert torch.equal(grad, right[name.replace("mono_forward", "local_loss")]), name


def test_regression_and_soft_labels_use_the_compiles_loss():
    model, (x, _) = mlp(), data()
    y = torch.rand(5, 3, dtype=torch.float64)
    compiled = gr.compile(
        model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers", loss=F.mse_loss
    )
    assert_close(compiled_grads(compiled, x, y), loop(model, heads_of(compiled), x, y, F.mse_loss)[0], rtol=1e-12)
    soft = y / y.sum(1, keepdim=True)
    compiled = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=soft, blocks="layers")
    assert_close(compiled_grads(compiled, x, soft), loop(model, heads_of(compiled), x, soft)[0], rtol=1e-12)


def test_ignored_targets_do_not_count():
    model, (x, y) = mlp(), data()
    y[[1, 3]] = -100
    compiled = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    kept = y != -100
    assert_close(compiled_grads(compiled, x, y), loop(model, heads_of(compiled), x[kept], y[kept])[0], rtol=1e-12)


def test_gradients_do_not_read_downstream_parameters():
    """Locality, by certificate and by perturbing everything behind a block."""
    model, (x, y) = mlp(), data()
    compiled = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    proved = compiled.report().certificates
    assert proved.locality_radius == 0
    assert not proved.update_locked
    assert not proved.weight_transport
    before = compiled_grads(compiled, x, y)
    names = list(before)
    for block, behind in (("0", ("2.", "4.")), ("2", ("4.",))):
        with torch.no_grad():
            saved = [p.clone() for p in compiled.parameters()]
            for name, p in compiled.named_parameters():
                if any(part in name for part in behind):
                    p.add_(torch.randn_like(p))
        after = compiled_grads(compiled, x, y)
        mine = [n for n in names if n.startswith(f"{block}.") or f"head.{block}." in n]
        assert len(mine) == 3
        for name in mine:
            assert torch.equal(before[name], after[name]), name
        assert not torch.equal(before["4.weight"], after["4.weight"])
        with torch.no_grad():
            for p, old in zip(compiled.parameters(), saved, strict=True):
                p.copy_(old)


def test_predict_is_the_last_answer_or_the_sum_of_all():
    model, (x, y) = mlp(), data()
    compiled = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    assert torch.equal(compiled.predict(x), model(x))
    summed = gr.compile(model, "mono_forward{predict=sum}", example_inputs=(x,), example_targets=y, blocks="layers")
    first, second = heads_of(summed).values()
    a = torch.tanh(model[0](x))
    b = torch.tanh(model[2](a))
    torch.testing.assert_close(summed.predict(x), (model[4](b) + a @ first.t() + b @ second.t()).detach())
    torch.testing.assert_close(summed.predictor()(x), summed.predict(x))


def test_parameters_before_materialisation_are_refused():
    compiled = gr.compile(mlp(), "mono_forward", blocks="layers")
    with pytest.raises(RuleError, match="example_inputs"):
        list(compiled.parameters())
    x, y = data()
    compiled.materialize(x, y)
    assert len(list(compiled.parameters())) == 8
    state = compiled.state_dict()
    assert "_graphrewrite.mono_forward.head.0.weight" in state


def test_bad_input():
    x, y = data()
    with pytest.raises(RuleError, match="needs targets"):
        gr.compile(mlp(), "mono_forward", example_inputs=(x,), blocks="layers")
    with pytest.raises(RuleError, match="at least one block before"):
        gr.compile(nn.Linear(6, 3).double(), "mono_forward", example_inputs=(x,), example_targets=y)
    compiled = gr.compile(mlp(), "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    with pytest.raises(RuleError, match=r"compiled\.loss"):
        compiled(x).sum().backward()
    with pytest.raises(RuleError, match=r"class 3, .* 3 classes"):
        compiled.loss(x, torch.tensor([0, 1, 3, 2, 0]))
    with pytest.raises(RuleError, match="predict='all' is unknown"):
        gr.compile(mlp(), "mono_forward{predict=all}", example_inputs=(x,), example_targets=y, blocks="layers")


class Mixing(nn.Module):
    """Its first block's output has no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_ones(x.shape[0], 1) * self.last(self.first(x).mean(0))


class Integers(nn.Module):
    """Its first block hands on integers: nothing can reach its weights but through a straight-through trick."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.table = nn.Embedding(8, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.table(self.first(x).argmax(-1)))


def test_blocks_that_no_head_can_read():
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    with pytest.raises(RuleError, match="share no batch dimension"):
        gr.compile(Mixing(), "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
    with pytest.raises(RuleError, match=r"block first .* no differentiable floating-point output"):
        gr.compile(Integers(), "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")


@pytest.mark.parametrize("name", ["cnn", "gcn", pytest.param("resnet", marks=pytest.mark.slow),
                                  pytest.param("vit", marks=pytest.mark.slow),
                                  pytest.param("gpt2", marks=pytest.mark.slow)])  # fmt: skip
def test_zoo(name):
    """Every parameter and head learns, from its own block's loss alone."""
    case = zoo.make(name)
    x, y = case.batch(case.sizes[0])
    compiled = gr.compile(case.model, "mono_forward", loss=case.loss).materialize(x, y)
    for size in case.sizes[:2]:
        x, y = case.batch(size)
        grads = compiled_grads(compiled, x, y)
        assert all(g.isfinite().all() for g in grads.values())
    assert all(parameter in grads for parameter, _ in case.model.named_parameters())
    proved = compiled.report().certificates
    assert proved.locality_radius == 0
    assert not proved.update_locked
    hidden = [b.block for b in proved.blocks][:-1]
    assert set(compiled.losses) == {*hidden, "task"}
    assert len([n for n in grads if n.startswith("_graphrewrite.")]) == len(hidden)
    # an independent check of locality: the first block's gradient is the same whatever lies behind it
    first = compiled.parameters_by_block()[hidden[0]]
    before = {n: grads[n] for n in first}
    with torch.no_grad():
        for block, names in compiled.parameters_by_block().items():
            if block != hidden[0]:
                for n, p in case.model.named_parameters():
                    if n in names:
                        p.mul_(1.5)
    if name != "gpt2":  # its first block's embedding is the last block's matrix as well
        after = compiled_grads(compiled, x, y)
        assert all(torch.equal(before[n], after[n]) for n in first)
