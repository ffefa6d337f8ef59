"""Inputs as they lie in memory: slices, transposed and expanded tensors give what contiguous ones do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import graphrewrite as gr
from graphrewrite.testing import assert_trains_like_eager

LAYOUTS = {
    "every second column": lambda n: torch.randn(n, 16)[:, ::2],
    "last columns": lambda n: torch.randn(n, 16)[:, 8:],
    "every second row": lambda n: torch.randn(2 * n, 8)[::2],
    "transposed slice": lambda n: torch.randn(16, n)[::2].t(),
    "expanded": lambda n: torch.randn(n, 1).expand(n, 8),
}


QUICK = "transposed slice"


@pytest.mark.parametrize("layout", [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS if n != QUICK)])
def test_one_capture_serves_all_sizes_of_a_layout(layout):
    batches = [(LAYOUTS[layout](n), torch.randint(0, 5, (n,))) for n in (4, 7, 5)]
    net = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    compiled = assert_trains_like_eager(net, batches, through="loss")
    assert compiled._captures == {"loss": 1}


def test_gaps_of_another_width_need_no_capture():
    net = nn.Sequential(nn.Linear(8, 5))
    y = torch.randint(0, 5, (4,))
    batches = [(torch.randn(4, 16)[:, ::2], y), (torch.randn(4, 40)[:, 3:11], y), (torch.randn(6, 8)[:4][:, :8], y)]
    compiled = assert_trains_like_eager(net, batches, through="loss")
    assert compiled._captures == {"loss": 2}  # the last one is contiguous


@pytest.mark.slow
def test_sliced_channels_last_images():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    make = (
        lambda n: torch.randn(n, 8, 6, 6).to(memory_format=torch.channels_last)[:, ::2],
        lambda n: torch.randn(n, 4, 12, 6)[:, :, ::2],
    )
    batches = [(f(n), torch.randint(0, 5, (n,))) for f in make for n in (4, 3)]
    compiled = assert_trains_like_eager(net, batches, through="loss")
    assert compiled._captures == {"loss": 2}


def test_sliced_targets_and_the_gradient_of_a_sliced_input():
    net = nn.Linear(8, 3)
    whole = torch.randn(4, 16, requires_grad=True)
    y = torch.randn(4, 6)[:, ::2]
    compiled = gr.compile(net, loss=lambda out, y: (out - y).square().sum())
    compiled.loss(whole[:, ::2], y).backward()
    found, whole.grad = whole.grad, None
    (net(whole[:, ::2]) - y).square().sum().backward()
    assert torch.equal(found, whole.grad)


class Windows(nn.Module):
    """Overlapping windows by strides, as signal code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, step = x.stride()
        return self.linear(x.as_strided((4, 3, 4), (rows, 2 * step, step))).mean(1)


def test_views_that_name_strides_see_the_input_as_it_lies():
    y = torch.randint(0, 5, (4,))
    batches = [(torch.randn(4, 8), y), (torch.randn(4, 16)[:, ::2], y), (torch.randn(4, 16)[:, :8], y)]
    assert_trains_like_eager(Windows(), batches, through="loss", dynamic=None)


STRIDED = """
import torch, graphrewrite as gr
for x in (torch.randn(4, 8)[:, :1], torch.randn(4, 16)[:, ::2], torch.randn(4, 5, 16)[:1, :, :8]):
    gr.compile(torch.nn.Linear(x.shape[-1], 3), loss=lambda out, y: out.sum()).loss(x, None).backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_capture_does_not_depend_on_the_order_of_sets(seed):
    subprocess.run([sys.executable, "-c", STRIDED], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=300)
