"""Ordinary training loops work unchanged on a compiled model: the same loop is run on it and on a copy in eager mode.

Where a rule has no eager counterpart, an identity that any true gradient obeys is checked instead: gradients add up
over micro-batches, scale with the loss, and average over the workers of `DistributedDataParallel`.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import socket
import time
import warnings
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks

import graphrewrite as gr
from graphrewrite.testing.compare import assert_same, gradients

RULES = ["bp", "dfa", "ff{peer=0}"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def net() -> nn.Sequential:
    """Batch-norm brings buffers, dropout random numbers."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
    )


def plain() -> nn.Sequential:
    """Sample by sample: the gradient of a mean is the mean of gradients."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def batches(steps: int = 4, n: int = 8, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(n, 6, generator=generator), torch.randint(0, classes, (n,), generator=generator))
        for _ in range(steps)
    ]


def eager_loss(model: nn.Module) -> Loss:
    return lambda x, y: gr.default_loss(model(x), y)


def assert_same_state(left: nn.Module, right: nn.Module, *, exact: bool = True) -> None:
    for (name, held), wanted in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        assert_same(held, wanted, name, exact=exact)
    wanted_gradients = gradients(right)
    for name, gradient in gradients(left).items():
        assert_same(gradient, wanted_gradients[name], f"gradient of {name}", exact=exact)


@functools.cache
def _captured(
    rule: str, make: Callable[[], nn.Module], dtype: torch.dtype, number: int
) -> tuple[gr.CompiledModule, dict]:
    torch.manual_seed(number)
    model = make().to(dtype)
    compiled = gr.compile(model, rule)
    x, y = batches(1, classes=model[-1].out_features)[0]
    compiled.materialize(x.to(dtype), y)
    return compiled, copy.deepcopy(compiled.state_dict())


def shared(
    rule: str = "bp", make: Callable[[], nn.Module] = net, dtype: torch.dtype = torch.float32, number: int = 0
) -> gr.CompiledModule:
    """A compiled model as it was right after its first capture; capturing is what takes the time here."""
    compiled, start = _captured(rule, make, dtype, number)
    compiled.load_state_dict(start)
    compiled.zero_grad()
    compiled.requires_grad_(True)
    return compiled.train()


def run_both(loop: Callable[[nn.Module, Loss], object]) -> None:
    """Run a loop on a compiled model, through `loss` and through the forward, and on a copy in eager mode."""
    reference = copy.deepcopy(shared().module)
    torch.manual_seed(1)
    wanted = loop(reference, eager_loss(reference))
    for through in ("forward", "loss"):
        compiled = shared()
        start = copy.deepcopy(compiled.module[0].weight)
        torch.manual_seed(1)
        found = loop(compiled, compiled.loss if through == "loss" else eager_loss(compiled))
        assert found == wanted, through
        assert_same_state(compiled.module, reference)
        assert not torch.equal(compiled.module[0].weight, start), "the loop trained nothing"


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, 1e-2),
        lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, foreach=True),
        lambda p: torch.optim.Adam(p, 1e-2, fused=True),
        lambda p: torch.optim.RMSprop(p, 1e-2, centered=True),
    ],
    ids=["sgd", "nesterov", "adam", "adamw_foreach", "adam_fused", "rmsprop"],
)
def test_optimizers(make):
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        optimizer = make(model.parameters())
        seen = []
        for x, y in batches():
            optimizer.zero_grad()
            value = loss(x, y)
            value.backward()
            optimizer.step()
            seen.append(value.item())
        return seen

    run_both(loop)


def test_optimizer_with_a_closure():
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
        x, y = batches(1)[0]

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(x, y)
            value.backward()
            return value

        return [optimizer.step(closure).item() for _ in range(2)]

    run_both(loop)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_gradient_clipping(clip):
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        norms = []
        for x, y in batches():
            optimizer.zero_grad()
            loss(x, y).backward()
            if clip == "norm":
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05).item())
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
        assert all(n > 0.05 for n in norms)
        return norms

    run_both(loop)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(set_to_none):
    def loop(model: nn.Module, loss: Loss) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for i, (x, y) in enumerate(batches(6)):
            (loss(x, y) / 3).backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)

    run_both(loop)


def test_two_losses_in_one_backward():
    def loop(model: nn.Module, loss: Loss) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        (x, y), (v, w) = batches(2)
        (loss(x, y) + 2 * loss(v, w)).backward()
        optimizer.step()

    run_both(loop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler(dtype):
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        seen = []
        for x, y in batches(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                value = loss(x, y)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            scaler.step(optimizer)
            scaler.update()
            seen.append(scaler.get_scale())
        return seen

    run_both(loop)


def test_grad_scaler_skips_a_step_that_overflows():
    x, y = batches(1)[0]
    compiled = shared()
    before = [p.detach().clone() for p in compiled.parameters()]
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(compiled.loss(x * float("inf"), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    for p, held in zip(compiled.parameters(), before, strict=True):
        assert torch.equal(p, held)


def test_parameter_groups():
    def loop(model: nn.Module, loss: Loss) -> None:
        named = dict(model.named_parameters())
        decayed = [p for n, p in named.items() if n.endswith("weight") and p.dim() > 1]
        rest = [p for n, p in named.items() if not (n.endswith("weight") and p.dim() > 1)]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0, "lr": 3e-2}], lr=1e-2
        )
        assert (len(decayed), len(rest)) == (3, 5)
        for x, y in batches():
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()

    run_both(loop)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=4),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
    ids=["step", "one_cycle", "cosine", "plateau"],
)
def test_schedulers(make):
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        scheduler = make(optimizer)
        rates = []
        for x, y in batches():
            optimizer.zero_grad()
            value = loss(x, y)
            value.backward()
            optimizer.step()
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(value.item())
            else:
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    run_both(loop)


def test_averaged_model():
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for x, y in batches():
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
            averaged.update_parameters(model)
        return [p.sum().item() for p in averaged.module.parameters()]

    run_both(loop)


def test_evaluation_between_steps():
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        seen = []
        for x, y in batches():
            model.train()
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                seen += [model(x).sum().item(), loss(x, y).item()]
        return seen

    run_both(loop)


def test_parameter_hooks():
    def loop(model: nn.Module, loss: Loss) -> list[float]:
        first, *_, last = model.parameters()
        calls = []
        handles = [
            first.register_hook(lambda g: g.clamp(-1e-2, 1e-2)),
            last.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.sum().item())),
        ]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x, y in batches(2):
            optimizer.zero_grad()
            loss(x, y).backward()
            assert first.grad.abs().max() <= 1e-2
            optimizer.step()
        for handle in handles:
            handle.remove()
        assert len(calls) == 2
        return calls

    run_both(loop)


def test_optimizer_step_inside_the_backward():
    """One optimizer per parameter, stepped as soon as its gradient is there."""

    def loop(model: nn.Module, loss: Loss) -> None:
        handles = []
        for p in model.parameters():
            optimizer = torch.optim.SGD([p], 0.1)

            def step(_p: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            handles.append(p.register_post_accumulate_grad_hook(step))
        for x, y in batches(3):
            loss(x, y).backward()
        for handle in handles:
            handle.remove()

    run_both(loop)


# --- the same for other rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_gradients_add_up_over_micro_batches(rule):
    """Two halves, each weighted by its share, give the gradient of the whole (two classes: one wrong label only)."""
    x, y = batches(1, classes=2)[0]
    compiled = shared(rule, plain, torch.float64)
    model = compiled.module
    whole = compiled.loss(x.double(), y)
    whole.backward()
    wanted = gradients(model)
    model.zero_grad()
    parts = [
        compiled.loss(x[rows].double(), y[rows]) * share for rows, share in ((slice(0, 2), 0.25), (slice(2, 8), 0.75))
    ]
    for part in parts:
        part.backward()
    assert_same(sum(parts).detach(), whole.detach(), "loss", exact=False)
    for name, gradient in gradients(model).items():
        assert gradient.any(), name
        assert_same(gradient, wanted[name], name, exact=False)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_scale_with_the_loss(rule):
    x, y = batches(1, classes=2)[0]
    found = []
    for factor in (1.0, 2.0**12):
        compiled = shared(rule, plain)
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        scaler.scale(compiled.loss(x, y)).backward()
        assert all(p.grad.any() for p in compiled.parameters())
        found.append({n: g / factor for n, g in gradients(compiled).items()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_follows_clipping_groups_and_schedule(rule):
    """The same loop, the optimizer's arithmetic written out by hand."""
    compiled = shared(rule, plain)
    optimizer = torch.optim.SGD(
        [{"params": list(compiled.parameters())[:2]}, {"params": list(compiled.parameters())[2:], "lr": 0.5}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for i, (x, y) in enumerate(batches(3, classes=2)):
        optimizer.zero_grad()
        compiled.loss(x, y).backward()
        raw = [p.grad.clone() for p in compiled.parameters()]
        norm = torch.stack([g.norm() for g in raw]).norm()
        before = [p.detach().clone() for p in compiled.parameters()]
        nn.utils.clip_grad_norm_(compiled.parameters(), 0.01)
        optimizer.step()
        scheduler.step()
        assert norm > 0.01
        for j, (p, b, g) in enumerate(zip(compiled.parameters(), before, raw, strict=True)):
            rate = (0.1 if j < 2 else 0.5) * 0.5**i
            assert torch.allclose(p, b - rate * g * (0.01 / (norm + 1e-6)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_parameter_hook_sees_the_gradient_of_the_rule(rule):
    x, y = batches(1, classes=2)[0]
    compiled = shared(rule, plain)
    compiled.loss(x, y).backward()
    wanted = gradients(compiled)
    model = shared(rule, plain).module
    handle = model[0].weight.register_hook(lambda g: -3 * g)
    compiled.loss(x, y).backward()
    handle.remove()
    assert torch.equal(model[0].weight.grad, -3 * wanted["0.weight"])
    assert torch.equal(model[2].weight.grad, wanted["2.weight"])


# --- state -----------------------------------------------------------------------------------------------------------


def trained(rule: str = "bp") -> gr.CompiledModule:
    compiled = shared(rule)
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
    for x, y in batches(2):
        optimizer.zero_grad()
        compiled.loss(x, y).backward()
        optimizer.step()
    return compiled


def next_gradients(compiled: gr.CompiledModule) -> dict[str, torch.Tensor]:
    x, y = batches(1, n=5)[0]
    compiled.zero_grad()
    torch.manual_seed(11)
    compiled.loss(x, y).backward()
    return gradients(compiled)


STATEFUL = ["bp", "dfa", pytest.param("ff", marks=pytest.mark.slow), "ff{readout=all}"]


@pytest.mark.parametrize("rule", STATEFUL)
def test_names_are_the_models_own(rule):
    compiled = trained(rule)
    model = net()
    own = [n for n in compiled.state_dict() if not n.startswith("_graphrewrite.") and n != "_extra_state"]
    assert own == list(model.state_dict())
    named = [n for n, _ in compiled.named_parameters() if not n.startswith("_graphrewrite.")]
    assert named == [n for n, _ in model.named_parameters()]
    held = {id(p) for p in compiled.parameters()}
    assert all(id(p) in held for p in compiled.module.parameters())


@pytest.mark.parametrize("rule", STATEFUL)
def test_state_dict_both_ways(rule):
    compiled = trained(rule)
    model = net()
    model.load_state_dict(compiled.module.state_dict())  # to the bare model
    assert_state_equal(model.state_dict(), compiled.module.state_dict())
    other = shared(rule, number=1)
    state_before = {n: t.clone() for n, t in other.rule_state.items()}
    other.load_state_dict(model.state_dict())  # from the bare model: the rule state stays
    assert_state_equal(other.module.state_dict(), model.state_dict())
    assert_state_equal(other.rule_state, state_before)
    other.load_state_dict(compiled.state_dict())  # from a compiled one: all of it
    assert_state_equal(other.state_dict(), compiled.state_dict())
    wanted = next_gradients(compiled)
    for name, gradient in next_gradients(other).items():
        assert_same(gradient, wanted[name], name)


def assert_state_equal(left, right) -> None:
    assert list(left) == list(right)
    for name, held in left.items():
        assert torch.equal(held, right[name]) if isinstance(held, torch.Tensor) else held == right[name], name


@pytest.mark.parametrize("rule", STATEFUL)
def test_state_survives_a_file(rule):
    """`torch.save` and `torch.load` of model and optimizer: training goes on as if nothing had happened."""
    compiled = trained(rule)
    optimizer = torch.optim.Adam(compiled.parameters(), 1e-2)
    next_gradients(compiled)
    optimizer.step()
    file = io.BytesIO()
    torch.save({"model": compiled.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = shared(rule, number=1)
    other.load_state_dict(loaded["model"])
    resumed = torch.optim.Adam(other.parameters(), 1e-2)
    resumed.load_state_dict(loaded["optimizer"])
    for one, stepper in ((compiled, optimizer), (other, resumed)):
        next_gradients(one)
        stepper.step()
    assert_state_equal(other.state_dict(), compiled.state_dict())


def test_strict_loading_reports_unknown_and_missing_names():
    compiled = trained()
    state = net().state_dict()
    state["extra"] = state.pop("0.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight") as error:
        compiled.load_state_dict(state)
    assert "extra" in str(error.value)
    assert compiled.load_state_dict(state, strict=False).unexpected_keys


@pytest.mark.parametrize("rule", ["bp", "dfa", "ff{readout=all}"])
def test_deepcopy_is_independent(rule):
    compiled = trained(rule)
    other = copy.deepcopy(compiled)
    wanted = next_gradients(compiled)
    found = next_gradients(other)
    for name, gradient in found.items():
        assert_same(gradient, wanted[name], name)
    state = copy.deepcopy(compiled.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    assert_state_equal(compiled.state_dict(), state)
    assert other.module is not compiled.module


@pytest.mark.parametrize("rule", ["dfa", "ff{readout=all}"])
def test_whole_module_survives_pickling(rule):
    compiled = trained(rule)
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_state_equal(other.state_dict(), compiled.state_dict())
    wanted = next_gradients(compiled)
    for name, gradient in next_gradients(other).items():
        assert_same(gradient, wanted[name], name)


# --- learned state that nothing trains -------------------------------------------------------------------------------


def warnings_of(compiled: gr.CompiledModule, *optimizers: torch.optim.Optimizer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches(4):
            compiled.loss(x, y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [str(w.message) for w in caught if w.filename == __file__]


def learned() -> gr.CompiledModule:
    """Every optimizer is judged once per compiled module: a fresh judgement, without a new capture."""
    compiled = shared("ff{readout=all}")
    compiled._untrained = type(compiled._untrained)()
    return compiled


def test_optimizer_on_the_model_alone_gets_one_warning():
    compiled = learned()
    (message,) = warnings_of(compiled, torch.optim.SGD(compiled.module.parameters(), 0.1))
    assert "ff.readout.weight" in message
    assert "compiled.parameters()" in message


def test_optimizers_that_train_everything_get_none():
    compiled = learned()
    assert not warnings_of(compiled, torch.optim.SGD(compiled.parameters(), 0.1))
    compiled = learned()
    assert not warnings_of(
        compiled,
        torch.optim.SGD(compiled.module.parameters(), 0.1),
        torch.optim.Adam(p for n, p in compiled.named_parameters() if n.startswith("_graphrewrite.")),
    )
    for rule in ("bp", "ff"):  # nothing is learned but the model
        assert not warnings_of(shared(rule), torch.optim.SGD(shared(rule).module.parameters(), 0.1))


def test_optimizers_of_other_models_are_not_judged():
    other = nn.Linear(2, 2)
    other(torch.randn(3, 2)).sum().backward()
    assert not warnings_of(learned(), torch.optim.SGD(other.parameters(), 0.1))


def test_frozen_learned_state_is_the_users_choice():
    compiled = learned()
    for name, p in compiled.named_parameters():
        p.requires_grad_(not name.startswith("_graphrewrite."))
    assert not warnings_of(compiled, torch.optim.SGD(compiled.module.parameters(), 0.1))


def test_the_watch_leaves_no_hook_behind():
    hooks = _global_optimizer_post_hooks
    before = len(hooks)
    compiled = learned()
    x, y = batches(1)[0]
    compiled.loss(x, y)
    assert len(hooks) == before + 1
    compiled._untrained = None
    assert len(hooks) == before
    compiled = learned()
    warnings_of(compiled, torch.optim.SGD(compiled.parameters(), 0.1))
    assert len(hooks) == before


# --- changes of the model after compilation --------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before compile", "after capture"])
def test_dtype_is_the_users(when):
    model = net()
    compiled = gr.compile(model)
    x, y = batches(1)[0]
    if when == "after capture":
        compiled.loss(x, y)
    compiled.to(torch.float64)
    reference = copy.deepcopy(model)
    torch.manual_seed(2)
    compiled.loss(x.double(), y).backward()
    torch.manual_seed(2)
    gr.default_loss(reference(x.double()), y).backward()
    assert next(compiled.parameters()).dtype == torch.float64
    assert_same_state(model, reference)


@pytest.mark.parametrize("rule", ["dfa", "ff{readout=all}"])
def test_rule_state_moves_with_the_module(rule):
    compiled = copy.deepcopy(trained(rule)).to(torch.float64)
    assert all(t.dtype == torch.float64 for t in compiled.rule_state.values())
    x, y = batches(1)[0]
    compiled.zero_grad()
    compiled.loss(x.double(), y).backward()
    for name, p in compiled.named_parameters():
        if rule == "ff{readout=all}" and name.startswith("6."):
            assert p.grad is None  # the head over all layers stands in for the last one
        else:
            assert p.grad.dtype == torch.float64, name
            assert p.grad.isfinite().all()


def loss_and_gradients(model: nn.Module, loss: Loss) -> None:
    x, y = batches(1)[0]
    model.zero_grad()
    torch.manual_seed(5)
    loss(x, y).backward()


def test_parameter_that_was_reassigned():
    compiled = shared(number=2)  # for this test alone: its modules are replaced
    model, reference = compiled.module, copy.deepcopy(compiled.module)
    loss_and_gradients(compiled, compiled.loss)
    loss_and_gradients(reference, eager_loss(reference))
    for one in (model, reference):
        torch.manual_seed(9)
        one[0].weight = nn.Parameter(torch.randn(8, 6))
        one[4] = nn.Linear(8, 8)
    loss_and_gradients(compiled, compiled.loss)
    loss_and_gradients(reference, eager_loss(reference))
    assert_same_state(model, reference)


def test_weights_loaded_after_capture():
    compiled, donor = shared(), net()
    model = compiled.module
    loss_and_gradients(compiled, compiled.loss)
    model.load_state_dict(donor.state_dict())
    loss_and_gradients(compiled, compiled.loss)
    loss_and_gradients(donor, eager_loss(donor))
    assert_same_state(model, donor)
    assigned = {n: t.clone() for n, t in net().state_dict().items()}
    model.load_state_dict(assigned, assign=True)
    donor.load_state_dict(assigned)
    loss_and_gradients(compiled, compiled.loss)
    loss_and_gradients(donor, eager_loss(donor))
    assert_same_state(model, donor)


def test_frozen_and_thawed_after_capture():
    compiled = shared()
    model, reference = compiled.module, copy.deepcopy(compiled.module)
    for frozen in ([], ["0.weight", "1.bias"], ["4.weight", "4.bias", "6.weight"], []):
        for one, loss in ((compiled, compiled.loss), (reference, eager_loss(reference))):
            for name, p in one.named_parameters():
                p.requires_grad_(name not in frozen)
            loss_and_gradients(one, loss)
        for name in frozen:
            assert model.get_parameter(name).grad is None
        assert_same_state(model, reference)


@pytest.mark.parametrize("rule", ["dfa", "ff"])
def test_frozen_layer_under_other_rules(rule):
    x, y = batches(1, classes=2)[0]
    compiled = shared(rule, plain)
    compiled.loss(x, y).backward()
    wanted = gradients(compiled)
    model = shared(rule, plain).module
    model[2].requires_grad_(False)
    compiled.loss(x, y).backward()
    assert model[2].weight.grad is None
    assert model[2].bias.grad is None
    for name in ("0.weight", "0.bias", "4.weight", "4.bias"):
        assert torch.equal(gradients(model)[name], wanted[name]), name


@pytest.mark.parametrize("rule", RULES)
def test_no_grad_and_eval_advance_nothing(rule):
    x, y = batches(1, classes=2)[0]
    compiled = shared(rule, plain)
    compiled.loss(x, y).backward()
    compiled.zero_grad()
    before = copy.deepcopy(compiled.state_dict())
    with torch.no_grad():
        under_no_grad = compiled.loss(x, y)
    assert not under_no_grad.requires_grad
    compiled.eval()
    in_eval = compiled.loss(x, y)
    assert not in_eval.requires_grad
    assert torch.equal(in_eval, under_no_grad)
    assert torch.equal(compiled.predict(x), compiled.predict(x))
    assert all(p.grad is None for p in compiled.parameters())
    assert_state_equal(compiled.state_dict(), before)


def test_forward_in_eval_is_the_original_module():
    compiled = shared()
    model = compiled.module
    compiled.loss(*batches(1)[0]).backward()
    compiled.eval()
    assert not any(m.training for m in model.modules())
    x, _ = batches(1)[0]
    assert torch.equal(compiled(x), model(x))
    assert compiled(x).requires_grad  # eval is no no_grad, as in torch
    compiled.train()
    assert all(m.training for m in model.modules())


# --- several processes -----------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(rank: int, port: int, rule: str, state: dict[str, torch.Tensor], results: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        model = plain().double()
        model.load_state_dict(state)
        compiled = gr.compile(model, rule)
        x, y = batches(1, classes=2)[0]
        mine = slice(4 * rank, 4 * rank + 4)
        compiled.materialize(x[mine].double(), y[mine])
        parallel = DistributedDataParallel(compiled.loss_module())
        optimizer = torch.optim.SGD(compiled.parameters(), 0.2)
        found = []
        for x, y in batches(2, classes=2):
            optimizer.zero_grad()
            parallel(x[mine].double(), y[mine]).backward()
            found.append(gradients(model))
            optimizer.step()
        torch.save({"gradients": found, "state": model.state_dict()}, f"{results}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rule", ["bp", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dfa", "ff{peer=0}"))])
def test_two_workers_are_one_process_on_the_joint_batch(rule, tmp_path):
    compiled = shared(rule, plain, torch.float64)
    model = compiled.module
    state = copy.deepcopy(model.state_dict())
    context = torch.multiprocessing.spawn(
        _worker, (_free_port(), rule, state, str(tmp_path)), nprocs=2, join=False, daemon=True
    )
    try:
        optimizer = torch.optim.SGD(compiled.parameters(), 0.2)
        wanted = []
        for x, y in batches(2, classes=2):
            optimizer.zero_grad()
            compiled.loss(x.double(), y).backward()
            wanted.append(gradients(model))
            optimizer.step()
        deadline = time.monotonic() + 180
        while not context.join(timeout=deadline - time.monotonic()):
            assert time.monotonic() < deadline, "the workers did not end"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.terminate()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for step, held in enumerate(found["gradients"]):
            for name, gradient in held.items():
                assert gradient.any()
                assert_same(gradient, wanted[step][name], f"{name} in step {step} of worker {rank}", exact=False)
        for name, held in found["state"].items():
            assert_same(held, model.state_dict()[name], f"{name} of worker {rank}", exact=False)
