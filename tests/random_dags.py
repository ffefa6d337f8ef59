"""Random models for property tests: a program of operators over a pool of vectors and maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

WIDTH = 16
Instruction = tuple[int, int, int, int]
"""Operator, first operand, second operand, variant; all taken modulo what there is."""

ACTIVATIONS = (torch.relu, torch.tanh, F.gelu, F.silu, F.softplus, torch.sigmoid, F.leaky_relu, torch.sin)


def check(examples: int, *, derandomize: bool) -> settings:
    """How much of what is random is tried."""
    return settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Dag(nn.Module):
    """(batch, WIDTH) -> (batch, out). What later instructions and the head do not read is a dead branch."""

    def __init__(self, program: Sequence[Instruction], out: int = 3) -> None:
        super().__init__()
        self.program, self.out = tuple(program), out
        self.weights = nn.ParameterDict()
        self.norms = nn.ModuleDict()
        self.used: dict[str, str] = {}
        self.building = True
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(7)
            self(torch.randn(3, WIDTH))
        self.building = False

    def weight(self, key: str, *shape: int, share: bool = False) -> torch.Tensor:
        """The parameter of an instruction; with `share`, an earlier one of the same shape if there is one."""
        if self.building:
            same = [name for name, p in self.weights.items() if tuple(p.shape) == shape]
            self.used[key] = same[-1] if share and same else key
            if self.used[key] == key:
                self.weights[key] = nn.Parameter(torch.randn(shape) / max(shape[-1], 1) ** 0.5)
        return self.weights[self.used[key]]

    def norm(self, key: str, kind, channels: int) -> nn.Module:
        if self.building:
            self.norms[key] = kind(channels)
        return self.norms[key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vectors, maps = [x], [x.view(-1, 1, 4, 4)]
        for number, (operator, a, b, variant) in enumerate(self.program):
            key = f"i{number}"
            if operator % 3 == 2:
                operate = MAPS[operator // 3 % len(MAPS)]
                made = operate(self, key, maps[-1 - a % len(maps)], maps[-1 - b % len(maps)], variant)
            else:
                operate = VECTORS[operator // 3 % len(VECTORS)]
                made = operate(self, key, vectors[-1 - a % len(vectors)], vectors[-1 - b % len(vectors)], variant)
            for value in made if isinstance(made, tuple) else (made,):
                (vectors if value.dim() == 2 else maps).append(value)
        last = torch.cat([vectors[-1], maps[-1].flatten(1), x[:, :2]], 1)
        return F.linear(last, self.weight("head", self.out, last.shape[1]))


# --- operators on (batch, features) --------------------------------------------------------------------------------


def _linear(dag, key, h, g, variant):
    width = (4, 8, 12, h.shape[1])[variant % 4]
    weight = dag.weight(key, width, h.shape[1], share=variant % 3 == 0)
    return F.linear(h, weight, dag.weight(key + "b", width) if variant % 2 else None)


def _matmul(dag, key, h, g, variant):
    if variant % 2:
        return h @ dag.weight(key, h.shape[1], h.shape[1], share=True).t()
    return h @ (g.t() @ g) / 16 if h.shape == g.shape else g @ g.t() @ h / 16


def _activation(dag, key, h, g, variant):
    return ACTIVATIONS[variant % len(ACTIVATIONS)](h)


def _merge(dag, key, h, g, variant):
    if h.shape[1] != g.shape[1]:
        return torch.cat([h, g], 1)[:, : 2 * WIDTH]
    return (h + g, h * g, h - 2 * g, torch.where(h > g, h, g), torch.stack([h, g], 1).mean(1), h * g.detach())[
        variant % 6
    ]


def _normalise(dag, key, h, g, variant):
    width = h.shape[1]
    if variant % 4 == 0:
        return dag.norm(key, nn.BatchNorm1d, width)(h)
    if variant % 4 == 1:
        return F.layer_norm(h, (width,), dag.weight(key, width, share=True))
    return h.softmax(1) * width if variant % 4 == 2 else F.normalize(h + 0.1, dim=1)


def _index(dag, key, h, g, variant):
    if h.shape[1] < 4:
        return torch.cat([h, h, h, h], 1)
    picks = (
        lambda: h[:, ::2],
        lambda: h[:, [3, 0, 0, 1]],
        lambda: h.gather(1, h.argsort(1)),
        lambda: h.index_select(1, torch.tensor([2, 2, 1])),
        lambda: h.flip(1)[:, 1:],
        lambda: h.chunk(2, 1),
    )
    return picks[variant % len(picks)]()


def _broadcast(dag, key, h, g, variant):
    choices = (
        lambda: h * dag.weight(key, h.shape[1], share=True),
        lambda: h - h.mean(1, keepdim=True),
        lambda: h + g[:, :1],
        lambda: h * g.sum(0)[:1],
        lambda: h - h.amax(1, keepdim=True) + g.var(1, keepdim=True),
        lambda: h * dag.weight(key, 1, 1),
    )
    return choices[variant % len(choices)]()


def _reshape(dag, key, h, g, variant):
    if h.shape[1] % 4:
        return F.pad(h, (0, 4 - h.shape[1] % 4))
    folded = h.reshape(h.shape[0], -1, 2, 2)
    return (folded, folded.transpose(1, 2).flatten(1), folded.permute(0, 3, 2, 1).reshape(h.shape), h.cumsum(1))[
        variant % 4
    ]


def _in_place(dag, key, h, g, variant):
    out = h.clone()
    if variant % 2:
        out[:, 0] = g[:, 0]
    else:
        out.mul_(2).add_(g[:, :1])
    return out


def _undifferentiated(dag, key, h, g, variant):
    if variant % 2:
        return h + g.detach().sum(1, keepdim=True)
    with torch.no_grad():
        scale = h.abs().mean()
    return h * scale


def _attention(dag, key, h, g, variant):
    q = F.linear(h, dag.weight(key, 8, h.shape[1])).view(-1, 2, 2, 2)
    return F.scaled_dot_product_attention(q, q, q.tanh(), is_causal=bool(variant % 2)).flatten(1)


VECTORS = (
    _linear, _merge, _activation, _linear, _matmul, _index, _normalise, _broadcast, _reshape, _in_place,
    _undifferentiated, _attention,
)  # fmt: skip


# --- operators on (batch, channels, height, width) -----------------------------------------------------------------


def _conv(dag, key, h, g, variant):
    weight = dag.weight(key, (2, 4, h.shape[1])[variant % 3], h.shape[1], 3, 3, share=variant % 2 == 0)
    return F.conv2d(h, weight, padding=1)


def _map_norm(dag, key, h, g, variant):
    if variant % 2:
        return dag.norm(key, nn.BatchNorm2d, h.shape[1])(h)
    return F.group_norm(h, 1, dag.weight(key, h.shape[1], share=True))


def _map_merge(dag, key, h, g, variant):
    if h.shape[2:] != g.shape[2:]:
        g = F.interpolate(g, size=h.shape[2:])
    if h.shape[1] == g.shape[1] and variant % 2:
        return h + g
    return torch.cat([h, g], 1)[:, :6]


def _resize(dag, key, h, g, variant):
    if h.shape[2] >= 4 or (h.shape[2] > 1 and variant % 2):
        return F.max_pool2d(h, 2) if variant % 3 else F.avg_pool2d(h, 2)
    return F.interpolate(h, scale_factor=2.0)


def _map_activation(dag, key, h, g, variant):
    return F.relu(h, inplace=False) if variant % 2 else F.silu(h)


def _to_vector(dag, key, h, g, variant):
    return h.mean((2, 3)) if variant % 2 else h.flatten(1)[:, : 2 * WIDTH]


def _transposed_conv(dag, key, h, g, variant):
    return F.conv_transpose2d(h, dag.weight(key, h.shape[1], 2, 2, 2), stride=1 + variant % 2)[..., :4, :4]


MAPS = (_conv, _map_activation, _map_merge, _conv, _map_norm, _resize, _to_vector, _transposed_conv)

number = st.integers(0, 35)
programs = st.lists(st.tuples(number, st.integers(0, 4), st.integers(0, 4), st.integers(0, 11)), min_size=1, max_size=9)
