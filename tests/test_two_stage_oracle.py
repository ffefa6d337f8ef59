"""The two stages against torch's own split of a backward, on the kinds of stages that its tests have."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.nn import functional as F

import graphrewrite as gr
from graphrewrite.testing.compare import assert_same
from helpers import Cube

WIDTH = 6


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Plain(Stage):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Custom(Stage):
    def forward(self, x):
        return self.b(Cube.apply(self.a(x)))


class Shared(Stage):
    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


class Tied(Stage):
    def forward(self, x):
        return F.linear(self.a(x), self.a.weight) + self.b(x)


class Parts(Stage):
    """An intermediate with several outputs, all of which go on."""

    def forward(self, x):
        first, second = self.a(x).chunk(2, dim=-1)
        return self.b(torch.cat([torch.sin(first) * second, second], dim=-1))


class Viewed(Stage):
    """The output is a view."""

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).view(-1, 2, WIDTH // 2)[:, 0]


class Gate(Stage):
    """A parameter of no dimension, which everything reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return x + torch.tanh(self.gate) * self.b(self.a(x))


class Frozen(Stage):
    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)

    def forward(self, x):
        return self.b(self.a(x))


class Unused(Stage):
    def forward(self, x):
        return torch.relu(self.a(x))


class Ids(Stage):
    """Ids repeat; the other input wants its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, WIDTH)

    def forward(self, x):
        ids = torch.arange(x.shape[0], device=x.device) % 2
        return self.b(torch.relu(self.a(x) + self.embed(ids)))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x[:, None, :, None].expand(-1, 1, -1, 2)))).flatten(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.LayerNorm(WIDTH)

    def forward(self, x):
        h = self.norm(x[None])
        return (x[None] + self.attention(h, h, h, need_weights=False)[0])[0]


STAGES = [Plain, Custom, Shared, Tied, Parts, Viewed, Gate, Frozen, Unused, Ids, Images, Attention]
QUICK = (Custom, Tied)


def torchs_own(model: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor | None:
    own = x.clone().requires_grad_()
    wanted = [p for p in model.parameters() if p.requires_grad]
    out = model(own)
    out = out.clone() if out._is_view() else out  # torch's split detaches outputs in place, which views refuse
    (gradient,), groups = stage_backward_input([out], [cotangent], [own], iter(wanted))
    stage_backward_weight(iter(wanted), groups)
    return gradient


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in STAGES])
def test_gradients_are_those_of_torchs_own_split(kind):
    torch.manual_seed(0)
    reference = kind().double()
    two = gr.compile(copy.deepcopy(reference), split_backward=True, dynamic=None)
    cotangent = torch.randn_like(reference(torch.randn(4, WIDTH).double()))
    for _ in range(3):  # gradients add up over iterations
        x = torch.randn(4, WIDTH).double()
        wanted = torchs_own(reference, x, cotangent)
        own = x.clone().requires_grad_()
        two(own).backward(cotangent)
        two.backward_weight()
        assert torch.allclose(own.grad, wanted, rtol=0, atol=1e-13)
    for name, p in reference.named_parameters():
        found = two.module.get_parameter(name).grad
        assert (found is None) == (p.grad is None), name
        if found is not None:
            assert torch.allclose(found, p.grad, rtol=1e-12, atol=1e-13), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_forwards_backwards_and_weight_gradients(seed):
    """A random schedule of one process: every micro-batch's F, I and W in that order, the rest at will."""
    torch.manual_seed(0)
    draw = random.Random(seed)
    model, count = Parts().double(), 6
    one = gr.compile(copy.deepcopy(model), dynamic=None)
    two = gr.compile(model, split_backward=True, dynamic=None)
    xs = [torch.randn(4, WIDTH).double() for _ in range(count)]
    states, outputs, order = [0] * count, {}, []
    while min(states) < 2 or two.pending:
        moves = [("F", i) for i in range(count) if states[i] == 0] + [("I", i) for i in range(count) if states[i] == 1]
        moves += [("W", n) for n in range(1, two.pending + 1)]
        kind, i = draw.choice(moves)
        if kind == "F":
            outputs[i] = two(xs[i].requires_grad_())
            states[i] = 1
        elif kind == "I":
            outputs.pop(i).square().sum().backward()
            states[i] = 2
            order.append(i)
        else:
            two.backward_weight(i)
    inputs = [x.grad.clone() for x in xs]
    for i in order:  # sums in the order of the backwards
        xs[i].grad = None
        one(xs[i]).square().sum().backward()
        assert_same(inputs[i], xs[i].grad, "gradient of the input")
    for name, p in one.module.named_parameters():
        assert_same(two.module.get_parameter(name).grad, p.grad, name)


@pytest.mark.slow
def test_accumulation_clipping_and_scaling_of_interleaved_micro_batches():
    torch.manual_seed(0)
    model = Tied()
    one = gr.compile(copy.deepcopy(model), dynamic=None)
    two = gr.compile(model, split_backward=True, dynamic=None)
    batches = [(torch.randn(4, WIDTH), torch.randint(0, WIDTH, (4,))) for _ in range(6)]
    for compiled in (one, two):
        optimizer = torch.optim.AdamW(compiled.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for step in range(2):
            optimizer.zero_grad()
            losses = [compiled.loss(*batch) / 3 for batch in batches[3 * step : 3 * step + 3]]
            for i, loss in enumerate(losses):
                scaler.scale(loss).backward()
                if compiled is two and i == 1:
                    two.backward_weight(1)
            if compiled is two:
                two.backward_weight()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(compiled.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert_same(b.detach(), a.detach(), name)
