"""Comparing a compiled model with eager mode, and gradients with an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from graphrewrite import api
from graphrewrite.inputs import as_inputs
from graphrewrite.runtime.module import CompiledModule

Loss = Callable[[Any, Any], torch.Tensor]


def call(model: nn.Module, x: Any) -> Any:
    """The model on `x` as `compiled.loss` would call it."""
    inputs = as_inputs(x)
    return model(*inputs.args, **inputs.kwargs)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Copies of all `.grad`, by name."""
    return {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}


def assert_same(actual: torch.Tensor | None, expected: torch.Tensor | None, what: str, *, exact: bool = True) -> None:
    """Bitwise equality, or closeness in the dtype's own precision; None equals only None."""
    if actual is None or expected is None:
        assert actual is None, f"{what}: a gradient where eager mode has none"
        assert expected is None, f"{what}: no gradient where eager mode has one"
        return
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    if exact:
        same = torch.equal(actual.nan_to_num(), expected.nan_to_num()) and torch.equal(actual.isnan(), expected.isnan())
        gap = (actual - expected).abs().max().item() if actual.numel() and not same else 0.0
        assert same, f"{what}: differs by up to {gap:.3g}"
    else:
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(actual.dtype, 1e-2)
        scale = expected.abs().max().item() if expected.numel() else 0.0
        gap = (actual - expected).abs().max().item() if actual.numel() else 0.0
        assert gap <= tolerance * max(scale, 1e-3), f"{what}: differs by {gap:.3g}, the largest entry is {scale:.3g}"


def assert_trains_like_eager(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    *,
    loss: Loss | None = None,
    exact: bool = True,
    through: str = "both",
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> CompiledModule:
    """Train a model compiled with `rule="bp"` and a copy in eager mode; outputs, gradients and buffers must agree.

    Args:
        model: The model; its copy is the reference.
        batches: `(x, y)` per step.
        loss: As for `compile`.
        exact: Bitwise, or close.
        through: `"loss"`: `compiled.loss`; `"forward"`: `compiled(x)` and the loss outside; `"both"`: in turn.
        optimizer: Makes the optimizer from parameters; default: SGD with momentum.
        options: For `compile`.
    """
    reference = copy.deepcopy(model)
    compiled = api.compile(model, loss=loss, **options)
    make = optimizer or (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    ours, theirs = make(compiled.parameters()), make(reference.parameters())
    loss_fn = loss or api.default_loss
    for step, (x, y) in enumerate(batches):
        in_graph = through == "loss" or (through == "both" and step % 2 == 0)
        torch.manual_seed(step)
        ours.zero_grad()
        actual = compiled.loss(x, y) if in_graph else loss_fn(call(compiled, x), y)
        actual.backward()
        torch.manual_seed(step)
        theirs.zero_grad()
        expected = loss_fn(call(reference, x), y)
        expected.backward()
        assert_same(actual.detach(), expected.detach(), f"loss at step {step}", exact=exact)
        left, right = gradients(model), gradients(reference)
        for name in left:
            assert_same(left[name], right[name], f"gradient of {name} at step {step}", exact=exact)
        ours.step()
        theirs.step()
    states = zip(model.state_dict().items(), reference.state_dict().values(), strict=True)
    for (name, state), wanted in states:
        assert_same(state, wanted, f"state {name}", exact=exact)
    return compiled
