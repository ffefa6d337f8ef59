"""Bytes that are alive: measured by tracking storages, predicted from the graph, and next to eager mode."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.analysis.liveness import LiveBytes
from graphrewrite.testing import zoo
from graphrewrite.testing.memory import (
    equal_blocks,
    gradient_bytes,
    measured_peak,
    peak_bytes,
    predicted_peak,
    saved_bytes,
)

WIDTH, BATCH = 32, 512
UNIT = BATCH * WIDTH * 4
"""Bytes of one block's activation."""
SCALARS = 2 * 4
"""The loss and its cotangent: they live outside of the stages that a prediction is made for."""


@functools.cache
def peaks(rule: str, depth: int) -> tuple[int, int]:
    """Measured and predicted peak of a step, the gradients that it leaves behind subtracted."""
    torch.manual_seed(0)
    model = equal_blocks(depth, WIDTH)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))
    compiled = gr.compile(model, rule, verify="off")
    compiled.loss(x, y).backward()
    gradients = gradient_bytes(model)
    return measured_peak(compiled, x, y) - gradients, predicted_peak(compiled) - gradients


def eager_peak(depth: int) -> int:
    model = equal_blocks(depth, WIDTH)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))
    step = lambda: gr.default_loss(model(x), y).backward()  # noqa: E731
    return peak_bytes(step, [*model.parameters(), x, y]) - gradient_bytes(model)


# --- peaks against depth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [(4, 8), pytest.param((4, 16, 64), marks=pytest.mark.slow)])
def test_forward_forward_is_flat_in_depth(depths):
    """While eager backpropagation grows with every block."""
    found = [peaks("ff", depth)[0] for depth in depths]
    assert max(found) <= 1.1 * min(found)
    eager = [eager_peak(depth) for depth in depths]
    assert eager[-1] - eager[0] >= 0.9 * (depths[-1] - depths[0]) * UNIT
    assert depths[-1] < 64 or found[-1] < 0.2 * eager[-1]


UNLOCKED = [
    "ff",
    "ff{loss=symba}",
    "ff{collaboration=previous}",
    "mono_forward",
    "local_loss{head=pred}",
    "local_loss{head=sim}",
    "local_loss{head=predsim}",
    "local_loss{head=dgl}",
    "local_loss{head=aug_local}",
    "local_loss{head=target_projection}",
    "lls",
    "lls{modulation=m}",
    "lls{modulation=mxm}",
    "counter_current",
]


@pytest.mark.slow
@pytest.mark.parametrize("rule", UNLOCKED)
def test_rules_whose_updates_are_not_locked_are_flat_in_depth(rule):
    """Gradients that a step returns are not activations: they are subtracted, those of heads as well."""
    found = [unlocked_peak(rule, depth) for depth in (4, 16)]
    assert max(found) <= 1.1 * min(found), [peak / UNIT for peak in found]


def unlocked_peak(rule: str, depth: int) -> int:
    torch.manual_seed(0)
    model = equal_blocks(depth, WIDTH)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))
    compiled = gr.compile(model, rule, verify="off")
    compiled.loss(x, y).backward()
    assert not compiled.report().certificates.update_locked
    returned = sum(p.grad.numel() * p.grad.element_size() for p in compiled.parameters() if p.grad is not None)
    return measured_peak(compiled, x, y) - returned


@pytest.mark.parametrize("rule", ["bp", "dfa"])
def test_global_rules_keep_one_activation_per_block(rule):
    grown = peaks(rule, 8)[0] - peaks(rule, 4)[0]
    assert 3 * UNIT <= grown <= 5 * UNIT


@pytest.mark.parametrize("depth", [4, 8])
def test_backpropagation_peaks_no_higher_than_eager(depth):
    assert peaks("bp", depth)[0] <= eager_peak(depth)


@pytest.mark.parametrize(("rule", "depth"), [("bp", 4), ("bp", 8), ("dfa", 4), ("dfa", 8), ("ff", 4), ("ff", 8)])
def test_predicted_peak_is_the_measured_one(rule, depth):
    measured, predicted = peaks(rule, depth)
    assert 0 <= measured - predicted <= SCALARS


# --- saved bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "resnet"])
def test_backpropagation_saves_no_more_than_eager(name):
    case = zoo.make(name)
    x, y = case.batch(16)
    reference = copy.deepcopy(case.model)
    compiled = gr.compile(case.model, verify="off").materialize(x, y)
    eager = saved_bytes(lambda: gr.default_loss(reference(x), y), [*reference.parameters(), *reference.buffers(), x, y])
    ours = saved_bytes(lambda: compiled.loss(x, y), [*compiled.parameters(), *compiled.buffers(), x, y])
    assert 0 < ours <= eager
    assert compiled.report().saved_bytes == ours


# --- the tracker -----------------------------------------------------------------------------------------------------


def test_tracker_counts_what_is_alive():
    x = torch.randn(100)
    with LiveBytes([x]) as live:
        a = x + 1
        assert (live.current, live.peak) == (400, 400)
        b = a.view(10, 10)[2:]  # no bytes of its own
        assert live.current == 400
        del a
        assert live.current == 400  # the view keeps them
        del b
        assert (live.current, live.peak) == (0, 400)
        x.view(10, 10).mul_(2)
        assert live.peak == 400
        c = [x + i for i in range(3)]
        assert (live.current, live.peak) == (1200, 1200)
        del c


def test_saved_bytes_of_a_known_case():
    """A linear layer saves its input, tanh its output."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    x = torch.randn(16, 8, requires_grad=True)
    h = x * 1  # an input that is no leaf
    assert saved_bytes(lambda: model(h).sum(), model.parameters()) == 16 * (8 + 4) * 4
    assert saved_bytes(lambda: model(h).sum(), [*model.parameters(), h]) == 16 * 4 * 4
