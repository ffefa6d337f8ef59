"""Update-unlocked training: the same parameters as the ordinary step, one block's gradient at a time."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.analysis.liveness import LiveBytes
from graphrewrite.errors import RuleError
from graphrewrite.testing import zoo


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def data(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def compiled_mlp(rule: str = "mono_forward", **options):
    x, y = data()
    return gr.compile(mlp(), rule, example_inputs=(x,), example_targets=y, blocks="layers", **options)


def adam(params) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.05)


def by_block(compiled) -> dict[str, torch.optim.Optimizer]:
    return {group["name"]: adam(group["params"]) for group in compiled.param_groups()}


def state(compiled) -> dict[str, torch.Tensor]:
    return {name: held.detach().clone() for name, held in (*compiled.named_parameters(), *compiled.named_buffers())}


def assert_same_course(make, batches, *, optimizers=by_block, loss_gap: float = 0.0) -> None:
    """Train one copy in ordinary steps and one in unlocked ones."""
    ordinary, unlocked = make(), make()
    plain, split = adam(ordinary.parameters()), optimizers(unlocked)
    for number, (x, y) in enumerate(batches):
        torch.manual_seed(number)
        plain.zero_grad()
        expected = ordinary.loss(x, y)
        expected.backward()
        wanted = {name: p.grad.clone() for name, p in ordinary.named_parameters() if p.grad is not None}
        plain.step()
        torch.manual_seed(number)
        names = {id(p): name for name, p in unlocked.named_parameters()}
        found: dict[str, torch.Tensor] = {}

        def look(_block, params, names=names, found=found, unlocked=unlocked):
            alive = [names[id(p)] for p in unlocked.parameters() if p.grad is not None]
            assert set(alive) == {names[id(p)] for p in params}, "a gradient of another block is alive"
            assert not found.keys() & set(alive), "a parameter is updated twice"
            found.update({names[id(p)]: p.grad.clone() for p in params})

        loss = unlocked.step_blocks(x, y, split, before_update=look)
        torch.testing.assert_close(loss, expected.detach(), rtol=loss_gap, atol=loss_gap)
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert torch.equal(found[name], grad), f"gradient of {name} at step {number}"
        assert unlocked.losses.keys() == ordinary.losses.keys()
        assert not any(p.grad is not None for p in unlocked.parameters())
    left, right = state(ordinary), state(unlocked)
    for name, held in left.items():
        assert torch.equal(held, right[name]), name
    assert ordinary.get_extra_state() == unlocked.get_extra_state()


@pytest.mark.parametrize("rule", ["mono_forward", "ff"])
def test_the_course_is_that_of_ordinary_steps(rule):
    assert_same_course(lambda: compiled_mlp(rule), [data(5), data(5), data(8)])


@pytest.mark.slow
def test_statistics_dropout_and_one_optimizer_for_all():
    def make():
        case = zoo.make("cnn")
        return gr.compile(case.model, "local_loss{head=predsim}").materialize(*case.batch(4))

    case = zoo.make("cnn")
    assert_same_course(make, [case.batch(4), case.batch(6)], optimizers=lambda c: adam(c.parameters()))


@pytest.mark.slow
def test_a_tied_parameter_is_updated_behind_its_last_block():
    case = zoo.make("gpt")
    batches = [case.batch(3), case.batch(3)]

    def make():
        model = zoo.make("gpt").model
        return gr.compile(model, "mono_forward").materialize(*batches[0])

    assert_same_course(make, batches)
    compiled = make()
    order: list[str] = []
    tied = compiled.module.token.weight

    def look(block, params):
        order.append(block)
        if any(p is tied for p in params):
            order.append("tied")

    compiled.step_blocks(*batches[0], by_block(compiled), before_update=look)
    assert order[-1] == "tied"
    assert order.count("tied") == 1
    assert len(order) >= 4


def test_optimizers_may_be_a_dict_a_list_one_or_a_function():
    batches = [data(), data()]
    results = []
    for form in (
        by_block,
        lambda c: list(by_block(c).values()),
        lambda c: adam(c.parameters()),
        lambda _c: adam,
    ):
        compiled = compiled_mlp()
        optimizers = form(compiled)
        for x, y in batches:
            compiled.step_blocks(x, y, optimizers)
        results.append(state(compiled))
    for other in results[1:]:
        for name, held in results[0].items():
            assert torch.equal(held, other[name]), name
    # the last one was made of a function
    assert list(compiled.block_optimizers()) == ["0", "2", "4"]
    held = compiled.block_optimizers()["2"].param_groups[0]["params"]
    assert [tuple(p.shape) for p in held] == [(7, 8), (7,), (3, 7)]
    with pytest.raises(RuleError, match="another function"):
        compiled.step_blocks(*batches[0], lambda params: torch.optim.SGD(params, lr=1.0))
    copy.deepcopy(compiled)


def test_groups_hold_each_parameter_once_with_the_head_of_its_block():
    compiled = compiled_mlp("local_loss")
    groups = compiled.param_groups()
    assert [g["name"] for g in groups] == ["0", "2", "4"]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in compiled.parameters())
    assert len(groups[0]["params"]) == 5  # weight and bias, D, its bias, A


def test_greedy_trains_one_block_and_runs_nothing_behind_it():
    compiled = compiled_mlp()
    x, y = data()
    optimizers = by_block(compiled)
    with torch.no_grad():
        compiled.loss(x, y)
    expected = compiled.losses["2"]
    reference = compiled_mlp()
    reference.loss(x, y).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    with torch.no_grad():
        compiled.module[4].weight.fill_(float("nan"))
    before, found = state(compiled), {}
    names = {id(p): name for name, p in compiled.named_parameters()}
    loss = compiled.step_blocks(
        x, y, {"2": optimizers["2"]}, greedy="2",
        before_update=lambda _block, params: found.update({names[id(p)]: p.grad.clone() for p in params}),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    assert compiled.losses.keys() == {"2"}
    after = state(compiled)
    changed = {name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
    assert changed == {"2.weight", "2.bias", "_graphrewrite.mono_forward.head.2.weight"}
    assert found.keys() == changed
    for name, grad in found.items():
        assert torch.equal(grad, wanted[name])


def test_greedy_layer_by_layer_learns():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    compiled = compiled_mlp()
    optimizers = by_block(compiled)
    for block in ("0", "2", "4"):
        first = compiled.step_blocks(x, y, optimizers, greedy=block)
        for _ in range(60):
            last = compiled.step_blocks(x, y, optimizers, greedy=block)
        assert last < 0.7 * first, block


def peak(compiled, step) -> int:
    gc.collect()
    with LiveBytes([*compiled.parameters(), *compiled.buffers()]) as live:
        step()
    return live.peak


@pytest.mark.slow
def test_live_bytes_with_gradients_do_not_grow_with_depth():
    """The ordinary step holds all gradients at its end; the unlocked one those of a block at a time."""
    found: dict[int, tuple[int, int]] = {}
    for depth in (3, 9):
        layers = [m for _ in range(depth) for m in (nn.Linear(48, 48), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(48, 4))
        x, y = torch.randn(8, 48), torch.randint(0, 4, (8,))
        compiled = gr.compile(model, "mono_forward", example_inputs=(x,), example_targets=y, blocks="layers")
        optimizers = {g["name"]: torch.optim.SGD(g["params"], lr=0.1) for g in compiled.param_groups()}
        compiled.step_blocks(x, y, optimizers)
        compiled.loss(x, y).backward()
        compiled.zero_grad()
        unlocked = peak(compiled, lambda c=compiled, x=x, y=y, o=optimizers: c.step_blocks(x, y, o))
        ordinary = peak(compiled, lambda c=compiled, x=x, y=y: c.loss(x, y).backward())
        found[depth] = (unlocked, ordinary)
    layer = 48 * 48 * 4
    assert found[9][0] <= 1.05 * found[3][0]
    assert found[9][1] >= found[3][1] + 5 * layer


def test_rules_whose_updates_are_locked_are_refused():
    for rule in ("bp", "dfa"):
        compiled = compiled_mlp(rule)
        with pytest.raises(RuleError, match=f"update of block 0, which learns by {rule}"):
            compiled.step_blocks(*data(), by_block(compiled))


def test_bad_input():
    compiled = compiled_mlp()
    x, y = data()
    optimizers = by_block(compiled)
    with pytest.raises(RuleError, match=r"no optimizer holds 2\.weight of block 2"):
        compiled.step_blocks(x, y, {name: o for name, o in optimizers.items() if name != "2"})
    with pytest.raises(RuleError, match="held by two"):
        compiled.step_blocks(x, y, [*optimizers.values(), adam(compiled.parameters())])
    with pytest.raises(RuleError, match="str is no optimizer"):
        compiled.step_blocks(x, y, ["adam"])
    with pytest.raises(RuleError, match="no block is named '7'"):
        compiled.step_blocks(x, y, optimizers, greedy="7")
    with pytest.raises(RuleError, match="3 classes"):
        compiled.step_blocks(x, y + 3, optimizers)
    with pytest.raises(RuleError, match="requires grad"):
        compiled.step_blocks(x.clone().requires_grad_(), y, optimizers)
    compiled.loss(x, y).backward()
    with pytest.raises(RuleError, match="holds a gradient already"):
        compiled.step_blocks(x, y, optimizers)
    compiled.zero_grad()
    compiled.eval()
    with pytest.raises(RuleError, match="step_blocks trains"):
        compiled.step_blocks(x, y, optimizers)
    frozen = compiled_mlp()
    frozen.module[2].requires_grad_(False)
    kept = frozen.module[2].weight.clone()
    frozen.step_blocks(x, y, [adam([p for p in frozen.parameters() if p.requires_grad])])
    assert torch.equal(kept, frozen.module[2].weight)
