"""`rule="bp"` against eager mode on every model of the zoo: outputs, gradients, parameters and buffers, bitwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

import graphrewrite as gr
from graphrewrite.testing import zoo
from graphrewrite.testing.compare import assert_same, assert_trains_like_eager, call, gradients

RECURRENT = {"lstm", "gru"}
"""Decomposed, which changes the order of sums: compared closely, in float64."""
SLOW_TO_CAPTURE = {"mamba", "t5", "gpt2"}
"""Captured once here; at size 1, and through `compiled(x)`, in the slow tests."""


def case_of(name: str) -> zoo.Case:
    case = zoo.make(name)
    if name in RECURRENT:
        case.model.double()
    return case


def batches(case: zoo.Case, sizes: list[int]):
    made = [case.batch(n) for n in sizes]
    return [(x.double(), y) if case.name in RECURRENT else (x, y) for x, y in made]


def assert_same_outputs(compiled: gr.CompiledModule, reference: torch.nn.Module, x, exact: bool) -> None:
    torch.manual_seed(0)
    actual = call(compiled, x)
    torch.manual_seed(0)
    expected = call(reference, x)
    assert type(actual) is type(expected)
    left, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(left) == len(right)
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if isinstance(a, torch.Tensor):
            assert_same(a.detach(), b.detach(), f"output {i}", exact=exact)


@pytest.mark.parametrize("name", zoo.names())
def test_trains_like_eager(name):
    """Four steps: `compiled.loss` at two sizes, `compiled(x)` and an outside loss at size 1."""
    case = case_of(name)
    first, second, one = case.sizes
    if name in SLOW_TO_CAPTURE:
        steps = batches(case, [first, second, first])
        compiled = assert_trains_like_eager(case.model, steps, loss=case.loss, through="loss")
        assert compiled._captures == {"loss": 1}
        return
    steps = batches(case, [first, one, second, one])
    compiled = assert_trains_like_eager(case.model, steps, loss=case.loss, exact=case.exact)
    assert compiled._captures == {"loss": 1, "forward": 1}  # the second size did not capture again
    assert_same_outputs(compiled, copy.deepcopy(case.model), steps[-1][0], case.exact)


@pytest.mark.slow
@pytest.mark.parametrize("through", ["loss", "forward"])
@pytest.mark.parametrize("name", zoo.names())
def test_trains_like_eager_in_full(name, through):
    """Every size on both ways, Adam, and passes held to their promise to change no number."""
    case = case_of(name)
    first, second, one = case.sizes
    steps = batches(case, [first, second, one, first, second])
    compiled = assert_trains_like_eager(
        case.model,
        steps,
        loss=case.loss,
        exact=case.exact,
        through=through,
        verify="numeric",
        optimizer=lambda p: torch.optim.AdamW(p, 1e-2),
    )
    if through == "forward":
        assert_same_outputs(compiled, copy.deepcopy(case.model), steps[1][0], case.exact)


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "vit"))]
)
def test_trains_like_eager_under_bf16_autocast(name):
    case = zoo.make(name)
    reference = copy.deepcopy(case.model)
    compiled = gr.compile(case.model, loss=case.loss)
    loss_fn = case.loss or gr.default_loss
    first, second, _ = case.sizes
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (compiled, reference)]
    for step, (x, y) in enumerate(batches(case, [first, second, first])):
        losses = []
        for own, optimizer in zip((compiled, reference), optimizers, strict=True):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = own.loss(x, y) if own is compiled else loss_fn(call(own, x), y)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
        assert_same(*losses, f"loss at step {step}")
        right = gradients(reference)
        for parameter, held in gradients(case.model).items():
            assert_same(held, right[parameter], f"gradient of {parameter} at step {step}")
        for optimizer in optimizers:
            optimizer.step()
    for state, held in case.model.state_dict().items():
        assert_same(held, reference.state_dict()[state], f"state {state}")


def test_random_generator_goes_on_as_in_eager_mode():
    """Capture draws nothing, and a step leaves torch's generator where eager mode leaves it."""
    case = zoo.make("cnn")
    x, y = case.batch(4)
    reference = copy.deepcopy(case.model)
    torch.manual_seed(3)
    gr.compile(case.model).loss(x, y).backward()
    ours = torch.rand(4)
    torch.manual_seed(3)
    gr.default_loss(reference(x), y).backward()
    assert torch.equal(ours, torch.rand(4))


class DeadNoise(torch.nn.Linear):
    def forward(self, x):
        torch.rand_like(x)  # nothing reads it, but eager mode draws it
        return torch.dropout(super().forward(x), 0.5, True)


def test_unread_random_numbers_are_drawn_too():
    steps = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(2)]
    assert_trains_like_eager(DeadNoise(4, 3), steps)
